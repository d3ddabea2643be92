"""Entropies and probabilities by the logit lens, a few rows at a time, against the plain formulas of all logits at once; and the rules for the critical layers."""

import itertools
from typing import get_args

import numpy as np
import pytest
import torch
import transformers

import dsft.backbone
from dsft.backbone import find_backbone, hidden_states
from dsft.inside import answer_probability
from dsft.selection import RULES, Curves, by_depth, by_english, by_entropy, by_retrieval, critical_layers, every_choice, risen, token_entropy
from dsft.settings import Rule

CASES = {  # vocabulary, final soft-cap, precision of the weights
    "large": (262_144, None, torch.float32),
    "large, bf16": (262_144, None, torch.bfloat16),
    "large, soft-cap": (262_144, 3.0, torch.float32),
    "large, soft-cap, bf16": (262_144, 3.0, torch.bfloat16),
    "small": (97, None, torch.float32),
    "small, soft-cap": (97, 3.0, torch.float32),
}


def build(vocab_size, softcap, dtype):
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=softcap,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=1.0)  # so that some tokens are much likelier than others
    return model.to(dtype)


def lens(model, ids, mask):
    """The logits of all layers at once in float32, [L + 1, B, T, vocab_size]; the matrix product is the model's own."""
    backbone = find_backbone(model)
    states = hidden_states(backbone, ids, mask, range(3)).inner
    logits = torch.stack([model.lm_head(model.model.norm(states[k])).float() for k in range(3)])
    return logits if backbone.softcap is None else backbone.softcap * torch.tanh(logits / backbone.softcap)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_few_rows_at_a_time_give_the_plain_formula(case, monkeypatch):
    model = build(*CASES[case])
    vocab_size, chunk = CASES[case][0], 5
    monkeypatch.setattr(dsft.backbone, "LOGITS_PER_CHUNK", chunk * vocab_size + 1)  # 11 rows are two chunks and one row, in blocks of 2
    monkeypatch.setattr(dsft.backbone, "LOGITS_PER_BLOCK", 2 * vocab_size)
    ids = torch.randint(3, vocab_size, (2, 7))
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    logits = lens(model, ids, mask)[:, mask]
    log_p, exact = logits.log_softmax(-1), logits.double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    # In bf16 a product of fewer rows may round otherwise: a logit is off by 1/256 of itself at most.
    rtol = 5e-6 if model.dtype == torch.float32 else 5e-3
    assert entropy.max() < np.log(vocab_size) - 0.5 and entropy.std() > 1e-3  # neither uniform nor alike
    found = token_entropy(model, {"input_ids": ids, "attention_mask": mask.long()})
    torch.testing.assert_close(found, entropy, rtol=rtol, atol=1e-6)  # a product of fewer rows may add up in another order
    # torch sums the softmax's denominator in float32, where 262,144 terms lose a digit or two: 5.5e-5 measured with the eight lanes of AVX2, less with sixteen.
    bound = 5e-5 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1e-4
    torch.testing.assert_close(found.double(), -(exact.exp() * exact).sum(-1), rtol=max(rtol, bound), atol=1e-6)

    prompts, answers = [ids[0].tolist(), ids[1, :4].tolist()], [[5, int(ids[0, 6])], [7, int(ids[1, 3])]]
    expected = torch.stack([log_p[:, last, tokens].exp() for last, tokens in zip((6, 10), answers)])
    torch.testing.assert_close(torch.from_numpy(answer_probability(model, prompts, answers)), expected, rtol=rtol * 4, atol=1e-9)


@torch.no_grad()
def test_the_largest_buffer_is_one_chunk(monkeypatch):
    model = build(262_144, None, torch.float32)
    sizes, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, out: sizes.append((out.untyped_storage().data_ptr(), out.untyped_storage().nbytes())) or mm(*args, out=out))
    ids = torch.randint(3, 262_144, (2, 70))
    found = token_entropy(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert len(sizes) == 3 * 3 and len(set(sizes)) == 1  # 140 rows of 3 layers, 64 at a time
    assert sizes[0][1] == 2**26 and np.isfinite(found).all()


ZEROS = [0.0] * 9
FALLS_TWICE = [9.0, 7.0, 7.0, 7.0, 7.0, 6.0, 4.0, 2.0, 1.0]


def curves(entropy=FALLS_TWICE, english=ZEROS, target=ZEROS, retrieval=ZEROS):
    return Curves(entropy, english, target, retrieval)


def test_the_rules_are_those_of_a_study_file():
    assert tuple(RULES) == get_args(Rule)
    assert [choice.rule for choice in every_choice(curves())] == list(RULES)


@pytest.mark.parametrize(
    ("curve", "layer"),
    [
        ([0, 0, 0, 0.55, 0.6, 0.8, 1, 0.9, 0.5], 3),  # a jump
        ([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], 4),  # a slope, half-way to the output
        ([0.4, 0.5, 0.6, 0.7, 0.8, 0.8, 0.8, 0.8, 0.8], 2),  # what parallel queries share before any layer is not counted
        ([0.9, 0.1, 0.2, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1], 3),  # never above the embeddings: its maximum
        ([0.5] * 9, 1),
    ],
)
def test_where_a_curve_has_risen(curve, layer):
    assert risen(curve) == layer


@pytest.mark.parametrize(
    ("english", "target", "retrieval", "expected"),
    [
        # the paper's picture: English first, the target language last
        ([0, 0, 0, 0.01, 0.1, 0.3, 0.2, 0.1, 0.01], [0, 0, 0, 0, 0, 0.01, 0.1, 0.3, 0.6], [0, 0.1, 0.6, 0.7, 0.8, 0.9, 0.8, 0.7, 0.6], (2, 5, True)),
        # a plateau: its first layer
        ([0, 0, 0, 0.2, 0.2, 0.2, 0.1, 0, 0], ZEROS, [0, 0, 1, 1, 1, 1, 1, 1, 1], (2, 3, True)),
        # retrieval rises at j or later: one layer apart
        ([0, 0, 0, 0.2, 0.1, 0, 0, 0, 0], ZEROS, [0, 0, 0, 0, 0, 0, 0, 1, 1], (2, 3, True)),
        # likeliest at the embeddings, in layer 1 or at the output, which are no places for j
        ([0.9, 0.9, 0.1, 0.2, 0.1, 0, 0, 0, 0.1], ZEROS, [0, 1, 1, 1, 1, 1, 1, 1, 1], (1, 3, True)),
        ([0, 0, 0, 0, 0, 0, 0.1, 0.2, 0.9], ZEROS, [0, 1, 1, 1, 1, 1, 1, 1, 1], (1, 7, False)),
        # the target answer is the likelier one there
        ([0, 0, 0, 0, 0.2, 0, 0, 0, 0], [0, 0, 0, 0, 0.3, 0.4, 0.5, 0.6, 0.7], [0, 1, 1, 1, 1, 1, 1, 1, 1], (1, 4, False)),
        # nothing to read anywhere
        (ZEROS, ZEROS, ZEROS, (1, 2, False)),
    ],
)
def test_the_english_rule(english, target, retrieval, expected):
    assert by_english(curves(english=english, target=target, retrieval=retrieval))[1:4] == expected


@pytest.mark.parametrize(
    ("retrieval", "expected"),
    [
        ([0.0, 0.1, 0.2, 0.5, 0.6, 0.7, 0.9, 0.8, 0.3], (3, 6, True)),
        ([0.0, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9], (1, 2, True)),  # ties: the lowest
        ([0.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.9, 1.0], (6, 7, True)),  # i and j one layer apart; best at the output, which does not count
        ([0.0, 0.1, 0.1, 0.2, 0.6, 0.3, 0.6, 0.5, 0.2], (4, 6, True)),  # a jump as high as what comes after it: i is where it has risen, j above
        ([0.5, 0.4, 0.3, 0.45, 0.3, 0.2, 0.1, 0.1, 0.1], (3, 4, False)),  # it only falls
    ],
)
def test_the_retrieval_rule(retrieval, expected):
    assert by_retrieval(curves(retrieval=retrieval))[1:4] == expected


@pytest.mark.parametrize(
    ("entropy", "premise"),
    [
        (FALLS_TWICE, True),
        ([0.0, *FALLS_TWICE[1:]], False),  # tied embeddings: the lens reads the input token back
        ([0.0, 0.0, 7.0, 7.0, 7.0, 6.0, 4.0, 2.0, 1.0], False),
        ([0.3, 9.0, 6.0, 6.0, 6.0, 6.0, 4.0, 2.0, 0.1], False),  # as good as zero
        ([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], False),  # falls once
        ([5.0] * 9, False),
    ],
)
def test_what_the_entropy_rule_rests_on(entropy, premise):
    choice, found = by_entropy(curves(entropy)), critical_layers(entropy)
    assert (choice.i, choice.j, choice.holds) == (found.i, found.j, premise)
    assert ("reads the input token back" in choice.rests_on) == (entropy[0] < 1)


def test_the_depth_rule():
    found = {top: by_depth(curves([0.0] * (top + 1)))[1:4] for top in range(3, 101)}
    assert found[32] == (2, 15, True) and found[18] == (1, 8, True) and found[26] == (2, 12, True) and found[80] == (5, 38, True)
    assert all(1 <= i < j < top for top, (i, j, _) in found.items())


@pytest.mark.parametrize("top", [3, 4, 5, 6])
def test_every_rule_keeps_within_the_smallest_models(top):
    for highest in itertools.product(range(top + 1), repeat=3):
        peaked = [[1.0 if k == peak else 0.1 * (k % 2) for k in range(top + 1)] for peak in highest]
        for choice in every_choice(Curves(*peaked[:2], [0.0] * (top + 1), peaked[2])):
            assert 1 <= choice.i < choice.j < top, (choice, highest)


def test_no_room_for_two_inner_layers():
    with pytest.raises(ValueError, match="2 layers leave no room"):
        every_choice(Curves([3.0, 2.0, 1.0], [0.0] * 3, [0.0] * 3, [0.0] * 3))


def test_without_answers_there_is_no_english_rule():
    assert [choice.rule for choice in every_choice(curves(english=[], target=[]))] == ["entropy", "retrieval", "depth"]
