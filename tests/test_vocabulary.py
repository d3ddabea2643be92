"""A vocabulary that is cut: the same tokens, texts and logits as before, on tokenizers and models of the kinds that studies have."""

import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from dsft.files import ParamsError
from dsft.phrasebook import LANGUAGES
from dsft.study import load_study
from dsft.vocabulary import cut_model, cut_tokenizer, id_fields, kept_ids, segmented_differently, study_texts

KEPT = ["the cat sat on the mat", "a hat, a cat", "猫坐在垫子上", "line\n\nline", ""]
OTHERS = ["zebras quiz the lynx", "Καλημέρα 🌊", "狗在跑", "the\t  end"]
SIZES = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2)


def gemma() -> PreTrainedTokenizerFast:
    """As Gemma's: blanks as ▁, bytes as <0x..>, newlines as added tokens, every way to a token among the merges."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Replace(" ", "▁")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<turn>", *(f"<0x{n:02X}>" for n in range(256))]
    trained.train_from_iterator([*KEPT, *OTHERS] * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=special, min_frequency=1))
    state = json.loads(trained.to_str())
    vocab = state["model"]["vocab"]
    ways = [(word[:n], word[n:]) for word in vocab for n in range(1, len(word)) if not word.startswith("<") and word[:n] in vocab and word[n:] in vocab]
    state["model"]["merges"] = sorted(ways, key=lambda pair: vocab["".join(pair)])
    state["added_tokens"] = [added for added in state["added_tokens"] if not added["content"].startswith("<0x")]
    made = Tokenizer.from_str(json.dumps(state))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_tokens([AddedToken("\n\n", normalized=False)])
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", padding_side="right")


def qwen() -> PreTrainedTokenizerFast:
    """As Qwen's: byte-level, no BOS, special tokens at the end."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trained.train_from_iterator([*KEPT, *OTHERS] * 3, trainers.BpeTrainer(vocab_size=360, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), min_frequency=1))
    trained.post_processor = processors.ByteLevel(trim_offsets=False)
    trained.add_special_tokens(["<|end|>", "<|im_start|>", "<|image|>"])
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|end|>", pad_token="<|end|>", padding_side="right")


def gemma_model(tokenizer) -> Gemma3ForCausalLM:
    """Tied; its answers end with one of two tokens."""
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    config = Gemma3TextConfig(**SIZES, head_dim=16, vocab_size=len(tokenizer), bos_token_id=2, pad_token_id=0, eos_token_id=[1, turn], sliding_window=8)
    model = Gemma3ForCausalLM(config)
    model.generation_config.suppress_tokens = [turn]
    return model


def qwen_model(tokenizer) -> Qwen2ForCausalLM:
    """Untied; more rows than tokens, but none for the last token, as where an image token was added later."""
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, vocab_size=len(tokenizer) - 1, eos_token_id=end, bos_token_id=None, pad_token_id=None, tie_word_embeddings=False))


@pytest.fixture(params=[(gemma, gemma_model), (qwen, qwen_model)], ids=["gemma", "qwen"])
def both(request):
    tokenizer = request.param[0]()
    torch.manual_seed(0)
    return tokenizer, request.param[1](tokenizer).eval()


def test_kept_texts_keep_their_tokens_and_all_texts_can_be_written(both):
    tokenizer, model = both
    ids = kept_ids(tokenizer, model, KEPT)
    small = cut_tokenizer(tokenizer, ids)
    assert len(small) == len(ids) < len(tokenizer)
    assert segmented_differently(tokenizer, small, ids, KEPT) == []
    for text in [*KEPT, *OTHERS]:
        assert small.decode(small(text)["input_ids"], skip_special_tokens=True) == text
    assert any(len(small(text)["input_ids"]) > len(tokenizer(text)["input_ids"]) for text in OTHERS)
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    assert {token.content for token in small.added_tokens_decoder.values()} == added
    assert [small.convert_ids_to_tokens(small.convert_tokens_to_ids(token)) for token in added] == list(added)
    for name in ("bos_token", "eos_token", "pad_token", "padding_side", "model_max_length"):
        assert getattr(small, name) == getattr(tokenizer, name)


def test_min_count_keeps_what_is_frequent(both):
    tokenizer, model = both
    often = kept_ids(tokenizer, model, ["the cat"] * 3 + ["zebras"], min_count=3)
    assert set(tokenizer("the cat")["input_ids"]) <= set(often)
    assert not set(tokenizer("zebras", add_special_tokens=False)["input_ids"]) <= set(often)
    assert set(often) < set(kept_ids(tokenizer, model, ["the cat"] * 3 + ["zebras"]))


def test_kept_logits_are_the_same_bits_and_the_model_is_plain(both, tmp_path):
    tokenizer, model = both
    ids = kept_ids(tokenizer, model, KEPT)
    small, rows = cut_tokenizer(tokenizer, ids), [id for id in ids if id < model.config.vocab_size]
    whole, cut = (t(KEPT[:3], return_tensors="pt", padding=True, return_token_type_ids=False) for t in (tokenizer, small))
    named = {field: value for _, field, value in id_fields(model)}
    with torch.no_grad():
        before = model(**whole).logits[..., rows]
        cut_model(model, ids)
        after = model(**cut).logits
    assert torch.equal(after, before)
    assert model.config.vocab_size == len(rows) == model.get_output_embeddings().weight.shape[0]

    old, moved = (lambda value, t=t: t.convert_ids_to_tokens(value if isinstance(value, list) else [value]) for t in (tokenizer, small))
    assert {field: moved(value) for _, field, value in id_fields(model)} == {field: old(value) for field, value in named.items()}

    model.save_pretrained(tmp_path)
    small.save_pretrained(tmp_path)
    again, tokens = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokens(KEPT)["input_ids"] == small(KEPT)["input_ids"]
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id
    table, head = again.get_input_embeddings(), again.get_output_embeddings()
    assert (head.weight is table.weight) == again.config.tie_word_embeddings
    assert table.padding_idx == again.config.pad_token_id
    with torch.no_grad():
        assert torch.equal(again.eval()(**cut).logits, after)


def test_a_saved_tokenizer_of_an_older_release_is_renumbered_too(both, tmp_path):
    tokenizer, model = both
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {str(id): {"content": token.content, "special": token.special} for id, token in tokenizer.added_tokens_decoder.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    older = AutoTokenizer.from_pretrained(tmp_path)
    ids = kept_ids(older, model, KEPT)
    small = cut_tokenizer(older, ids)
    assert len(small) == len(ids) and segmented_differently(older, small, ids, KEPT) == []


class Beside(LlamaForCausalLM):
    """A model that looks up its tokens in a second table."""

    def forward(self, input_ids, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.logits = output.logits * (1 + input_ids[..., None] % 7)
        return output


def test_what_cannot_be_cut_is_refused_in_one_line():
    tokenizer, sizes = gemma(), SIZES | {"vocab_size": 400}
    model = Beside(Beside.config_class(**sizes)).eval()
    with pytest.raises(ParamsError, match="looks up tokens beside its embedding and cannot be cut; leave `vocabulary` out") as told:
        cut_model(model, list(range(0, 400, 3)))
    assert "\n" not in str(told.value)
    for bad, why in (
        (models.Unigram([("a", 0.0), ("b", -1.0)], 0, False), "it is Unigram, not byte-pair encoding"),
        (models.WordLevel({"a": 0}, "a"), "it is WordLevel"),
        (models.BPE({"a": 0, "b": 1, "##b": 2}, [], continuing_subword_prefix="##"), "it marks or drops the inner parts of a word"),
        (models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]), "it has no token for some bytes"),
    ):
        with pytest.raises(ParamsError, match=why) as told:
            cut_tokenizer(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(bad)), [0])
        assert "\n" not in str(told.value)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["post_processor"] = {"type": "BertProcessing", "sep": ["<eos>", 1], "cls": ["<bos>", 2]}
    with pytest.raises(ParamsError, match="it adds tokens by BertProcessing"):
        cut_tokenizer(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state))), [0])


def test_texts_are_those_of_every_language_and_of_all_rows(tmp_path):
    """Instruction data and benchmarks from files: the texts do not depend on how many rows are trained on or asked."""
    folder = tmp_path / "data"
    (folder / "benchmarks" / "xcopa").mkdir(parents=True)
    for lang, word in (("en", "What is number {}?"), ("zh", "{}是什么数？")):
        rows = [{"id": n, "instruction": word.format(n), "input": "", "output": word.format(n + 100)} for n in range(30)]
        (folder / f"{lang}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    items = [{"idx": n, "premise": f"第{n}个人很高兴。", "choice1": "他哭了。", "choice2": f"他笑了{n}次。", "question": "effect", "label": 1} for n in range(20)]
    (folder / "benchmarks" / "xcopa" / "test.zh.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in items), encoding="utf-8")
    (tmp_path / "study.yaml").write_text(
        f"""
models: {{micro-llama: {{path: models/micro-llama, vocabulary: {{min_count: 2}}}}}}
languages: [zh]
methods: [tft]
data: {{source: files, files: {{en: {folder}/en.jsonl, zh: {folder}/zh.jsonl}}, items: 3}}
evaluation: {{source: files, data_dir: {folder}/benchmarks, benchmarks: [xcopa], items: 2, part: dev}}
"""
    )
    study = load_study(tmp_path / "study.yaml")
    texts = study_texts(study)
    for text in ("29是什么数？\n", "129是什么数？", "What is number 29?\n", "What is number 129?", "他笑了19次。"):
        assert text in texts
    assert len(texts) == len(set(texts))
    assert any("第19个人很高兴。" in text for text in texts)
    assert study.base("micro-llama") == str(study.folder("micro-llama", "cut")) and study.source("micro-llama").endswith("models/micro-llama")


def test_the_languages_of_the_microcosm_are_read_for_every_seed():
    study = load_study("smoke").model_copy(update={"seeds": (0, 1)})
    assert "zh" in LANGUAGES
    assert set(study_texts(study.model_copy(update={"seeds": (0,)}))) < set(study_texts(study))
