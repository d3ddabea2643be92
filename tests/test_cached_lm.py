"""The likelihoods of choices, with every context read once: those of lm-eval's HFLM, to the token and in its order."""

from pathlib import Path

import pytest
import torch
import transformers
from conftest import seq2seq
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from dsft import cached_lm
from dsft.cached_lm import SharedContextLM

MODELS = Path(__file__).parents[1] / "models"
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=6144)
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, max_position_embeddings=24),
    "qwen2": transformers.Qwen2Config(**SIZES, max_position_embeddings=24, tie_word_embeddings=True),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=8, max_position_embeddings=24, sliding_window=6, final_logit_softcapping=3.0, attn_logit_softcapping=2.0),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, head_dim=8, max_position_embeddings=24, sliding_window=6),
}


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODELS / "micro-llama")


def random_model(name, attention="sdpa"):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention).eval()
    for weight in model.parameters():  # so that what is read makes a difference
        weight.data.mul_(4)
    return model


def both(model, tokenizer, **arguments):
    return tuple(kind(pretrained=model, tokenizer=tokenizer, **{"batch_size": 3, **arguments}) for kind in (HFLM, SharedContextLM))


def random_requests():
    """Contexts with one to five choices each, their order mixed: choices of one token, choices that begin alike, the same twice, some too long for 24 positions."""
    g = torch.Generator().manual_seed(1)
    ids = lambda n: torch.randint(3, 6144, (n,), generator=g).tolist()
    requests = []
    for item in range(12):
        context = ids(1 + 2 * item)
        first = ids(3)
        choices = [ids(1), ids(1), first + ids(1), first + ids(5), first + ids(1)][: 1 + item % 5]
        requests += [((f"context {item}", f"choice {n}"), context, choice) for n, choice in enumerate(choices + choices[:1])]
    return [requests[n] for n in torch.randperm(len(requests), generator=g)]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    assert [answer[0] for answer in ours] == pytest.approx([answer[0] for answer in theirs], abs=1e-4)
    assert [answer[1] for answer in ours] == [answer[1] for answer in theirs]


@pytest.mark.parametrize(("name", "attention"), [(name, kind) for name in CONFIGS for kind in ("sdpa", "eager") if (name, kind) != ("gemma2", "sdpa")])
def test_the_answers_are_those_of_hflm(name, attention, tokenizer):
    theirs, ours = both(random_model(name, attention), tokenizer)
    assert ours._obstacle() is None
    requests = random_requests()
    assert any(len(context) + len(choice) > 25 for _, context, choice in requests)  # these are cut
    assert_same(ours._loglikelihood_tokens(requests, disable_tqdm=True), theirs._loglikelihood_tokens(requests, disable_tqdm=True))


def test_what_is_likeliest_is_greedy(tokenizer):
    theirs, ours = both(random_model("llama"), tokenizer)
    context = [5, 6, 7]
    with torch.no_grad():
        text = ours.model.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 3:].tolist()
    requests = [(("", ""), context, text), (("", ""), context, text[:1]), (("", ""), context, [*text[:3], text[3] - 1])]
    answers = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in answers] == [True, True, False]
    assert_same(answers, theirs._loglikelihood_tokens(requests, disable_tqdm=True))


def test_a_context_is_read_once_and_a_batch_is_no_larger_than_hflms(tokenizer, monkeypatch):
    ours, sizes = both(random_model("llama"), tokenizer)[1], []
    pad_trees = cached_lm.pad_trees
    monkeypatch.setattr(cached_lm, "pad_trees", lambda trees: sizes.append(pad_trees(trees)[0].shape) or pad_trees(trees))
    context = list(range(10, 20))
    requests = [((str(item), str(n)), [item, *context], [n, n]) for item in range(3, 9) for n in range(3, 6)]
    ours._loglikelihood_tokens(requests, disable_tqdm=True)
    assert sizes == [(2, 14), (2, 14), (2, 14)]  # three rows of 12 have room for two of 11 + 3


def test_few_logits_are_kept_at_a_time(tokenizer, monkeypatch):
    theirs, ours = both(random_model("llama"), tokenizer)
    monkeypatch.setattr(cached_lm, "LOGITS_PER_CHUNK", 6144 * 2)
    requests = random_requests()
    assert_same(ours._loglikelihood_tokens(requests, disable_tqdm=True), theirs._loglikelihood_tokens(requests, disable_tqdm=True))


@pytest.mark.parametrize("batch_size", [1, "auto"])
def test_texts_without_a_context_and_long_ones(batch_size, tokenizer):
    theirs, ours = both(random_model("llama"), tokenizer, batch_size=batch_size, max_batch_size=4)
    texts = ["The street gets wet.", "街上很湿。", " ".join(["Rain makes the street wet."] * 12), "a"]
    asked = [Instance("loglikelihood", {}, ("", text), 0) for text in (*texts[:2], texts[3])] + [Instance("loglikelihood", {}, (texts[2], " ja"), 0)]
    assert_same(ours.loglikelihood(asked), theirs.loglikelihood(asked))
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), abs=1e-3)
    assert ours.loglikelihood([]) == []


def test_every_answer_goes_to_lm_evals_cache(tokenizer):
    ours, kept = both(random_model("llama"), tokenizer)[1], {}
    ours.cache_hook.add_partial = lambda kind, texts, answer: kept.update({(kind, *texts): answer})
    requests = random_requests()
    answers = ours._loglikelihood_tokens(requests, disable_tqdm=True)
    assert kept == {("loglikelihood", *texts): answer for (texts, *_), answer in zip(requests, answers)}


def test_what_cannot_be_read_in_branches_is_read_by_hflm(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(cached_lm, "packed_hidden_states", lambda *_, **__: pytest.fail("read in branches"))
    requests = random_requests()
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=24, vocab_size=6144)).eval()
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=6144)).eval()
    for model, arguments, why in (
        (gpt2, {}, "packed branches fail in GPT2LMHeadModel"),
        (bloom, {}, "BloomModel computes its attention in a way of its own"),
        (random_model("llama"), {"mixed_precision_dtype": torch.bfloat16}, "autocast"),
    ):
        theirs, ours = both(model, tokenizer, **arguments)
        assert why in ours._obstacle()
        assert_same(ours._loglikelihood_tokens(requests, disable_tqdm=True), theirs._loglikelihood_tokens(requests, disable_tqdm=True))
    folder = seq2seq(tmp_path)
    t5 = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    theirs, ours = both(t5, transformers.AutoTokenizer.from_pretrained(folder), max_length=64)
    asked = [Instance("loglikelihood", {}, ("rain", text), 0) for text in ("wet", "dry street")]
    assert "encoder-decoder" in ours._obstacle()
    assert_same(ours.loglikelihood(asked), theirs.loglikelihood(asked))
