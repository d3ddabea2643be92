"""Entropies and probabilities by the logit lens, a few rows at a time, against the plain formulas of all logits at once."""

import numpy as np
import pytest
import torch
import transformers

import dsft.backbone
from dsft.backbone import find_backbone, hidden_states
from dsft.inside import answer_probability
from dsft.selection import token_entropy

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
    # torch sums the softmax's denominator in float32, where 262,144 terms lose a digit or two.
    torch.testing.assert_close(found.double(), -(exact.exp() * exact).sum(-1), rtol=max(rtol, 5e-5), atol=1e-6)

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
