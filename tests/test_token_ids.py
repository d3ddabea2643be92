"""One way from text to token ids: trained, generated, scored and looked into with the same ids, by tokenizers of every kind, built here and small."""

import json
import tempfile
from collections.abc import Callable
from functools import cache
from itertools import chain
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
from conftest import ROOT
from datasets import Dataset
from lm_eval.api.instance import Instance
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dsft import generation
from dsft.cached_lm import SharedContextLM
from dsft.data import begins_with_space, load_parallel, padded, prefix_ids, prompt_ids, text_ids, tokenize
from dsft.files import ParamsError
from dsft.inside import tokenize_question
from dsft.microcosm import LANGUAGES, World
from dsft.prompts import TEMPLATES
from dsft.settings import DataParams

GPT4 = Regex(r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PROMPTS = [TEMPLATES[name].prompt("删除线？ How <b>old</b> is it", blank) for name in ("alpaca", "plain") for blank in ("", "  two spaces\nand a line")]
PROMPTS += ["<s> is a tag, </s> its end.\n", " a space in front:", "café ﬁ 你好吗？\n"]
ANSWERS = ["It is red.", "很好", "<s>旧价</s> 新价 </s> 完", "1,234 €", "two\n\nlines ", "It's <pad> [SEP] <|endoftext|><|im_end|>."]


@cache
def corpus() -> list[str]:
    lines = [sentence[lang] for sentence in World().sentences(60) for lang in LANGUAGES]
    return lines + PROMPTS * 3 + ANSWERS * 3 + list("abcdefghijklmnopqrstuvwxyz<>/|[]:.,!?#'_0123456789€é")


def bpe(special: list[str], normalizer=None, pre_tokenizer=None, decoder=None, bytes_: bool = False, **options) -> Tokenizer:
    """A BPE with `special` first in its vocabulary: of bytes (byte-level) or of characters with bytes to fall back to (SentencePiece's)."""
    options |= {} if bytes_ else {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    made = Tokenizer(models.BPE(**options))
    made.normalizer, made.pre_tokenizer, made.decoder = normalizer or normalizers.Sequence([]), pre_tokenizer or pre_tokenizers.Sequence([]), decoder or decoders.Fuse()
    first = special + ([] if bytes_ else [f"<0x{n:02X}>" for n in range(256)])
    alphabet = pre_tokenizers.ByteLevel.alphabet() if bytes_ else []
    trainer = trainers.BpeTrainer(vocab_size=len(first) + len(alphabet) + 250, special_tokens=first, initial_alphabet=alphabet, max_token_length=16, show_progress=False)
    made.train_from_iterator(corpus(), trainer)
    return made


def byte_level(special: list[str], add_prefix_space: bool = False, split=None, **options) -> Tokenizer:
    level = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=split is None)
    whole = pre_tokenizers.Sequence([pre_tokenizers.Split(split, "isolated"), level]) if split else level
    return bpe(special, pre_tokenizer=whole, decoder=decoders.ByteLevel(), bytes_=True, **options)


def unigram(special: list[str], prepend: str = "always") -> Tokenizer:
    """SentencePiece's other model, in whose vocabulary the special tokens are pieces with a score, the best of all."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(prepend_scheme=prepend), decoders.Metaspace(prepend_scheme=prepend)
    made.train_from_iterator(corpus(), trainers.UnigramTrainer(vocab_size=700, special_tokens=special, unk_token="<unk>", show_progress=False))
    return made


def word_piece(special: list[str]) -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer, made.decoder = normalizers.BertNormalizer(lowercase=False), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    made.train_from_iterator(corpus(), trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False))
    return made


def wrapped(made: Tokenizer, single: str = "$A", **options) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of transformers; `single` is what it puts around a text."""
    around = [(token, made.token_to_id(token)) for token in single.split() if token != "$A"]
    if around:
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **options)


def native() -> transformers.PreTrainedTokenizerBase:
    """SentencePiece itself, without the `tokenizers` library, as GPT-SW3 has it."""
    folder = tempfile.mkdtemp()
    Path(folder, "corpus.txt").write_text("\n".join(line.replace("\n", " ") for line in corpus()), encoding="utf-8")
    options = {"model_type": "bpe", "vocab_size": 700, "byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(input=f"{folder}/corpus.txt", model_prefix=f"{folder}/m", control_symbols=["<pad>", "<|endoftext|>"], **options)
    return transformers.GPTSw3Tokenizer(f"{folder}/m.model", pad_token="<pad>", bos_token="<|endoftext|>", eos_token="</s>", unk_token="<unk>", name_or_path="gpt-sw3")


LLAMA = ["<unk>", "<s>", "</s>"]
SPM = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
SPM_DECODER = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def gemma() -> transformers.PreTrainedTokenizerFast:
    """No space in front, tags of HTML as tokens that are no special ones."""
    made = bpe(["<pad>", "<eos>", "<bos>", "<unk>"], normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), SPM_DECODER)
    made.add_tokens([AddedToken("<b>", normalized=False), AddedToken("</b>", normalized=False)])
    return wrapped(made, "<bos> $A", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>", padding_side="left")


# Family -> what builds its tokenizer, what it puts in front of a text, whether it begins every text with a space.
FAMILIES: dict[str, tuple[Callable, list[str], bool]] = {
    "llama2: SentencePiece BPE with BOS": (lambda: wrapped(bpe(LLAMA, SPM, decoder=SPM_DECODER), "<s> $A", **NAMES), ["<s>"], True),
    "alpaca: llama2 that appends EOS": (lambda: wrapped(bpe(LLAMA, SPM, decoder=SPM_DECODER), "<s> $A </s>", **NAMES), ["<s>"], True),
    "mistral: Metaspace in front of the first word": (
        lambda: wrapped(bpe(LLAMA, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False), decoder=SPM_DECODER), "<s> $A", **NAMES), ["<s>"], True,
    ),
    "gemma: SentencePiece BPE without a space in front": (gemma, ["<bos>"], False),
    "t5: Unigram that appends EOS": (lambda: wrapped(unigram(["<pad>", "</s>", "<unk>"]), "$A </s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"), [], True),
    "xlm-r: Unigram with BOS that appends EOS": (lambda: wrapped(unigram(["<s>", "<pad>", "</s>", "<unk>"]), "<s> $A </s>", pad_token="<pad>", **NAMES), ["<s>"], True),
    "xglm: Unigram that begins with EOS": (lambda: wrapped(unigram(["<s>", "<pad>", "</s>", "<unk>"]), "</s> $A", pad_token="<pad>", **NAMES), ["</s>"], True),
    "gpt2: bytes, one special token for all": (
        lambda: wrapped(byte_level(["<|endoftext|>"]), bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"), [], False,
    ),
    "qwen: bytes without BOS": (
        lambda: wrapped(byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], split=GPT4, normalizer=normalizers.NFC()), eos_token="<|im_end|>",
                        pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>"], padding_side="left"), [], False,
    ),
    "llama3: bytes with BOS, words before merges": (
        lambda: wrapped(byte_level(["<|begin_of_text|>", "<|endoftext|>"], split=GPT4, ignore_merges=True), "<|begin_of_text|> $A", bos_token="<|begin_of_text|>", eos_token="<|endoftext|>"),
        ["<|begin_of_text|>"], False,
    ),
    "bloom: bytes, padded on the left": (
        lambda: wrapped(byte_level([*LLAMA, "<pad>"], split=Regex(r" ?[^(\s|[.,!?…。，、।۔،])]+")), pad_token="<pad>", padding_side="left", **NAMES), [], False,
    ),
    "roberta: bytes with a space in front": (
        lambda: wrapped(byte_level(["<s>", "<pad>", "</s>", "<unk>"], add_prefix_space=True), "<s> $A </s>", pad_token="<pad>", **NAMES), ["<s>"], True,
    ),
    "chatglm: two tokens in front, padded on the left": (
        lambda: wrapped(bpe([*LLAMA, "[gMASK]", "<sop>"], SPM, decoder=SPM_DECODER), "[gMASK] <sop> $A", eos_token="</s>", unk_token="<unk>", bos_token="<sop>",
                        pad_token="<unk>", additional_special_tokens=["[gMASK]"], padding_side="left"), ["[gMASK]", "<sop>"], True,
    ),
    "nllb: a language in front, EOS behind": (
        lambda: wrapped(unigram(["<s>", "<pad>", "</s>", "<unk>", "zho_Hans"]), "zho_Hans $A </s>", pad_token="<pad>", additional_special_tokens=["zho_Hans"], **NAMES), ["zho_Hans"], True,
    ),
    "bert: WordPiece": (
        lambda: wrapped(word_piece(["[PAD]", "[UNK]", "[CLS]", "[SEP]"]), "[CLS] $A [SEP]", eos_token="[SEP]", bos_token="[CLS]", unk_token="[UNK]", pad_token="[PAD]"), ["[CLS]"], False,
    ),
    "byt5: bytes in Python that appends EOS": (transformers.ByT5Tokenizer, [], False),
    "gpt-sw3: SentencePiece itself": (native, [], True),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda name: name.split(":")[0])
def family(request):
    make, prefix, spaced = FAMILIES[request.param]
    tokenizer = make()
    return tokenizer, [tokenizer.convert_tokens_to_ids(token) for token in prefix], spaced


@pytest.fixture(scope="module")
def trained(family) -> list[tuple[str, str, list[int], list[int]]]:
    """Prompt and answer, as text and as the ids that a model is trained on."""
    pairs = [(prompt, answer) for prompt in PROMPTS for answer in ANSWERS]
    rows = Dataset.from_list([{"x_tgt": x, "y_tgt": y, "x_en": x, "y_en": y} for x, y in pairs])
    made = tokenize(rows, family[0], 10_000)
    assert made["x_tgt"][:] == made["x_en"][:] and made["y_tgt"][:] == made["y_en"][:]
    return [(x, y, row["x_tgt"], row["y_tgt"]) for (x, y), row in zip(pairs, made)]


@pytest.fixture(scope="module")
def lm(family) -> SharedContextLM:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(family[0]), **size)).eval()
    return SharedContextLM(pretrained=model, tokenizer=family[0], batch_size=4)


def test_there_are_at_least_twelve_families():
    assert len(FAMILIES) >= 12


def test_special_tokens_stand_where_training_puts_them_and_nowhere_else(family, trained):
    tokenizer, prefix, _ = family
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special and n != tokenizer.unk_token_id}
    assert prefix_ids(tokenizer) == prefix
    for _, _, x, y in trained:
        assert x[: len(prefix)] == prefix and y[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in x[len(prefix) :] + y[:-1] and special.isdisjoint(x[len(prefix) :] + y[:-1])


def test_ids_are_those_of_the_tokenizer_where_nothing_is_spelled_out(family, trained):
    tokenizer, prefix, _ = family
    for x_text, y_text, x, y in trained:
        for text, ids in ((x_text, x[len(prefix) :]), (y_text, y[:-1])):
            if not any(token in text for token in tokenizer.all_special_tokens):
                assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_prompt_to_go_on_with_has_the_ids_of_training(family, trained, lm, monkeypatch):
    tokenizer, *_ = family
    x_of = {x_text: x for x_text, _, x, _ in trained}
    prompts = list(x_of)
    ids, mask = lm.tok_batch_encode(prompts)
    assert [row[seen.bool()].tolist() for row, seen in zip(ids, mask)] == list(x_of.values())
    assert all(seen.sort().values.equal(seen) for seen in mask), "padded on the left"
    assert lm.tok_batch_encode(prompts, left_truncate_len=5)[0].tolist() == [x[-5:] for x in x_of.values()]
    assert [lm.tok_encode(prompt) for prompt in prompts] == list(x_of.values())
    assert [tokenize_question(tokenizer, {"prompt": prompt, "answers": ["1"]}, 10_000).prompt for prompt in prompts] == list(x_of.values())

    given = {}
    monkeypatch.setattr(type(lm.model), "generate", lambda self, **options: given.update(options) or options["input_ids"])
    generation.greedy_answers(lm.model, tokenizer, prompts, "###", 4)
    assert [row[seen.bool()].tolist() for row, seen in zip(given["input_ids"], given["attention_mask"])] == list(x_of.values())


def test_a_choice_is_scored_with_the_ids_of_training(family, trained, lm, monkeypatch):
    tokenizer, _, spaced = family
    assert begins_with_space(tokenizer) == spaced
    delimiter = " " if spaced else ""
    for x_text, y_text, x, y in trained:
        assert lm._encode_pair(x_text, delimiter + y_text) == lm._encode_pair(x_text, y_text) == (x, y[:-1])
    asked = []
    monkeypatch.setattr(lm, "_loglikelihood_tokens", lambda requests, **_: asked.extend(requests) or [(0.0, False)] * len(requests))
    lm.loglikelihood([Instance("loglikelihood", {}, (x_text, delimiter + y_text), 0) for x_text, y_text, *_ in trained], disable_tqdm=True)
    assert [(x, y) for _, x, y in asked] == [(x, y[:-1]) for _, _, x, y in trained]


def test_after_the_space_that_a_tokenizer_puts_there_the_ids_are_those_of_the_whole_text(family):
    """The trap of SentencePiece: an answer by itself begins with "▁", right after the prompt it would not."""
    tokenizer, _, spaced = family
    prompt = TEMPLATES["alpaca"].prompt("Name a colour.")
    for answer in ("It is red.", "很好"):
        (whole, x, y) = text_ids(tokenizer, [prompt + (" " if spaced else "") + answer, prompt, answer])
        assert whole == x + y


def test_an_empty_prompt_is_what_stands_in_front_or_bos_or_eos(family, lm):
    tokenizer, prefix, _ = family
    start = prefix or [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    assert prompt_ids(tokenizer, [""]) == [start] and lm._encode_pair("", "1")[0] == start
    assert text_ids(tokenizer, [""]) == [[]] and text_ids(tokenizer, []) == []


def test_the_text_comes_back(family, trained):
    tokenizer, *_ = family
    if not tokenizer.is_fast or type(tokenizer.backend_tokenizer.model).__name__ != "BPE":
        return  # the others normalise, or do not know every character
    for _, y_text, _, y in trained:
        assert tokenizer.decode(y, skip_special_tokens=True, clean_up_tokenization_spaces=False).removeprefix(" ") == y_text


# ---- what a user can still choose
def test_arguments_of_hflm_are_heard():
    tokenizer = FAMILIES["xglm: Unigram that begins with EOS"][0]()
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
    bare = SharedContextLM(pretrained=model, tokenizer=tokenizer, add_bos_token=False, prefix_token_id=7)
    assert bare.tok_encode("a") == text_ids(tokenizer, ["a"])[0] == bare._encode_pair("a", "b")[0] and bare._encode_pair("", "b")[0] == [7]
    assert bare.tok_encode("a", add_special_tokens=True) == prompt_ids(tokenizer, ["a"])[0]
    other = SharedContextLM(pretrained=model, tokenizer=tokenizer, prefix_token_id=7)
    assert other._encode_pair("", "b")[0] == [7] and other._encode_pair("a", "b")[0] == prompt_ids(tokenizer, ["a"])[0]
    assert other.tok_encode("a", add_special_tokens=False) == text_ids(tokenizer, ["a"])[0]
    with pytest.raises(ParamsError, match="without a chat template; use lm-eval's own hf"):  # whose special tokens would be text
        other.apply_chat_template([{"role": "user", "content": "a"}])


def test_an_eos_that_is_not_marked_as_special_is_one():
    """As a tokenizer.json has it whose author forgot to say so; other tokens that were added and are no special ones stay tokens."""
    tokenizer = FAMILIES["qwen: bytes without BOS"][0]()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = False
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    bare._special_tokens_map["eos_token"] = "<|im_end|>"  # without the mark that its setter makes
    assert bare.eos_token == "<|im_end|>" and not bare.added_tokens_decoder[bare.eos_token_id].special
    text = "<|im_start|> ends <|im_end|>"
    (ids,) = text_ids(bare, [text])
    assert bare.eos_token_id not in ids and bare.decode(ids) == text and ids[0] == bare.convert_tokens_to_ids("<|im_start|>")


def test_a_tokenizer_that_cannot_keep_text_apart_is_one_line(monkeypatch):
    tokenizer = FAMILIES["xglm: Unigram that begins with EOS"][0]()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ParamsError, match="takes a part of 'an end: </s>' for a special token; remove it from the text"):
        text_ids(tokenizer, ["a", "an end: </s>"])


# ---- the shipped models
@pytest.mark.parametrize("name", ["micro-llama", "micro-gemma2"])
def test_the_shipped_bases_are_trained_on_the_ids_they_always_were(name):
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "models" / name)
    rows = load_parallel(DataParams(items=60), "ar")
    made = tokenize(rows, tokenizer, 512)
    for side in ("tgt", "en"):
        assert made[f"x_{side}"][:] == [[tokenizer.bos_token_id, *ids] for ids in tokenizer(rows[f"x_{side}"][:], add_special_tokens=False)["input_ids"]]
        assert made[f"y_{side}"][:] == [[*ids, tokenizer.eos_token_id] for ids in tokenizer(rows[f"y_{side}"][:], add_special_tokens=False)["input_ids"]]
    assert made["x_tgt"][:] == tokenizer(rows["x_tgt"][:])["input_ids"]


def test_rows_are_padded_on_either_side():
    rows = [[5, 6, 7], [8]]
    assert [t.tolist() for t in padded(rows, 2)] == [[[5, 6, 7], [8, 2, 2]], [[1, 1, 1], [1, 0, 0]]]
    assert [t.tolist() for t in padded(rows, 2, "left")] == [[[5, 6, 7], [2, 2, 8]], [[1, 1, 1], [0, 0, 1]]]
    assert sorted(chain(*rows)) == [5, 6, 7, 8]
