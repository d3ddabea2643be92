"""SDRRL: agreement, code-switching, translation and the mix, in the microcosm and on real Alpaca; and its place in the graph of a study."""

import json
import os
import random
import string
import subprocess
import sys
from itertools import product

import pytest
import torch
import transformers
import yaml
from conftest import ROOT, alpaca, seq2seq
from hypothesis import given, settings
from hypothesis import strategies as st

from dsft.code_switching import code_switch
from dsft.generation import translator
from dsft.recipes import sdrrl
from dsft.microcosm import LANGUAGES, World
from dsft.files import ParamsError
from dsft.study import Study
from dsft.training import recipe_options

ENGLISH_WORDS = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat", "dog"]), max_size=9).map(" ".join)


def subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, by its definition."""
    if not a or not b:
        return 0
    return 1 + subsequence(a[1:], b[1:]) if a[0] == b[0] else max(subsequence(a[1:], b), subsequence(a, b[1:]))


@settings(max_examples=60, deadline=None)
@given(ENGLISH_WORDS, ENGLISH_WORDS)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(answer, reference):
    a, b = answer.split(), reference.split()
    common = subsequence(a, b)
    expected = 1.0 if answer == reference else 2 * common / (len(a) + len(b)) if common else 0.0
    assert sdrrl.rouge_l(answer, reference) == pytest.approx(expected)


@given(st.text(string.ascii_letters + " ,.'-çé", max_size=60), st.sets(st.text("abcdé", min_size=1, max_size=3), max_size=5), st.randoms())
def test_code_switching_touches_known_words_only(text, known, rng):
    words = {word: f"<{n}>" for n, word in enumerate(sorted(known))}
    assert code_switch(text, words, "en", 0.0, rng) == text
    switched = code_switch(text, words, "en", 1.0, rng)
    for before, after in zip(text.split(" "), switched.split(" "), strict=True):
        bare = before.strip(",.'-")
        if bare == before and bare.isalpha():
            assert after == words.get(before, words.get(before.lower(), before))


@given(st.lists(st.sampled_from(["中", "国", "中国", "x", "人"]), max_size=12).map("".join), st.randoms())
def test_code_switching_without_spaces_takes_the_longest_word(text, rng):
    words = {"中国": "China", "中": "middle", "人": "person"}
    assert code_switch(text, words, "zh", 1.0, rng) == text.replace("中国", "China").replace("中", "middle").replace("人", "person")


def test_the_rate_is_the_share_of_switched_words():
    words = {word: other for word, other in World().dictionary("ar").items() if " " not in word + other}  # one for one, so that they can be counted
    text = " ".join(list(words)[:100] * 40)
    single = [w for w in text.split(" ") if w in words]
    switched = code_switch(text, words, "en", 0.15, random.Random(0)).split(" ")
    share = sum(w not in words for w in switched) / len(single)
    assert 0.13 < share < 0.17


def test_the_microcosm_translates_every_answer_and_question_of_its_instructions():
    world = World()
    for item, lang in product(world.instructions(120, seed=7), LANGUAGES[1:]):
        assert world.translate(item["en"]["query"], lang) == item[lang]["query"]
        assert world.translate(item["en"]["answer"], lang)
    assert world.translate("No such sentence.", "zh") is None


# ---- the translation model
def study_on(tmp_path, **changes) -> Study:
    """A study with SDRRL on real Alpaca; `changes` are options of the recipe."""
    data = {"source": "files", "files": {lang: alpaca(lang) for lang in ("en", "vi")}, "items": 24, "template": "alpaca"}
    fields = {
        "models": {"micro-llama": {"path": str(ROOT / "models" / "micro-llama")}},
        "languages": ["vi"],
        "methods": ["sdrrl"],
        "data": data,
        "runs": str(tmp_path / "runs"),
    }
    options = {"code_switch": 0.0, "max_new_tokens": 6, "rouge_l": 0.0, "batch_size": 5} | changes
    return Study(**{"name": "study", **fields, "recipes": {"sdrrl": options}})


def base(run):
    model = transformers.AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(run.base)


def test_the_translator_is_told_the_language_and_asked_once(tmp_path, monkeypatch):
    codes = {"en": "eng_Latn", "vi": "vie_Latn"}
    run = study_on(tmp_path, translator=seq2seq(tmp_path / "mt"), translator_codes=codes).run("micro-llama", "vi", "sdrrl", 0)
    asked = []
    generate = transformers.T5ForConditionalGeneration.generate
    monkeypatch.setattr(transformers.T5ForConditionalGeneration, "generate", lambda self, **k: asked.append(k) or generate(self, **k))
    texts = ["One.", "Two and two.", "Three."]
    options = recipe_options(run.study, "sdrrl")
    into_vietnamese = lambda texts: translator(options, run.study, "vi", "recipes.sdrrl")(texts)
    first = into_vietnamese(texts)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.translator)
    assert len(first) == 3 and [k["forced_bos_token_id"] for k in asked] == [tokenizer.convert_tokens_to_ids("vie_Latn")]
    assert into_vietnamese(texts) == first and len(asked) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"translator_codes": {"en": "eng_Latn"}}, "sdrrl.translator_codes = .*: has no code for en and vi"),
        ({"translator_codes": {"en": "eng_Latn", "vi": "klingon"}}, "sdrrl.translator_codes.vi = 'klingon': .* knows no such language"),
        ({"translator": "{folder}/none"}, "sdrrl.translator = "),
        ({"translator": "no-such-user/no-such-model-{lang}"}, "sdrrl.translator = 'no-such-user/no-such-model-vi': .*(hub|folder)"),
    ],
)
def test_a_translator_that_is_none_is_one_line(tmp_path, monkeypatch, changes, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    changes = {"translator": seq2seq(tmp_path / "mt")} | {k: v.replace("{folder}", str(tmp_path)) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(ParamsError, match=said) as error:
        run = study_on(tmp_path, **changes).run("micro-llama", "vi", "sdrrl", 0)
        sdrrl.resources(run, recipe_options(run.study, "sdrrl"))
    assert "\n" not in str(error.value)


# ---- the mix
def test_the_mix_of_real_alpaca_goes_on_after_a_kill(tmp_path, monkeypatch):
    run = study_on(tmp_path, translator=seq2seq(tmp_path / "mt")).run("micro-llama", "vi", "sdrrl", 0)
    model, tokenizer = base(run)
    rows, report = sdrrl.training_mix(run, recipe_options(run.study, "sdrrl"), model, tokenizer)
    assert report["rows"]["question"] == 4 * 24 and report["rows"]["translation"] == 2 and report["examples"] == 24
    assert sum(n for how, n in report["answers"].items() if how != "mean ROUGE-L") == 24
    by = {row["id"]: row for row in rows}
    for n in {row["id"].split("/")[0] for row in rows if row["task"] == "question"}:
        four = {c: by[f"{n}/{c}"] for c in recipe_options(run.study, "sdrrl").combinations}
        asked = {c: row["x_tgt"].replace(f" Answer in {named}.", "") for (c, row), named in zip(four.items(), ("English", "Vietnamese", "English", "Vietnamese"), strict=True)}
        assert asked["en-en"] == asked["en-tgt"] == four["tgt-en"]["x_en"] != asked["tgt-en"] == asked["tgt-tgt"]
        assert [c for c in four if asked[c] != four[c]["x_tgt"]] == ["en-tgt", "tgt-en"]  # these say in which language
        assert four["en-en"]["y_tgt"] == four["tgt-en"]["y_tgt"] == four["tgt-tgt"]["y_en"] and four["en-tgt"]["y_tgt"] == four["tgt-tgt"]["y_tgt"]
    assert all(row[field] for row in rows for field in ("x_tgt", "y_tgt", "x_en", "y_en"))

    (file,) = run.study.folder("micro-llama").glob("answers-*.jsonl")
    whole = file.read_text(encoding="utf-8")
    file.write_text("".join(whole.splitlines(keepends=True)[:10]) + '{"n": 3, "ans', encoding="utf-8")
    generated = []
    generate = type(model).generate
    monkeypatch.setattr(type(model), "generate", lambda self, **k: generated.append(len(k["input_ids"])) or generate(self, **k))
    again, _ = sdrrl.training_mix(run, recipe_options(run.study, "sdrrl"), model, tokenizer)
    assert sum(generated) == 24 - 10 and again == rows and sorted(file.read_text(encoding="utf-8").splitlines()) == sorted(whole.splitlines())


def test_nothing_that_translates_means_the_reference_in_both_languages(tmp_path):
    (tmp_path / "known.jsonl").write_text('{"en": "nothing like it", "translation": "không"}\n', encoding="utf-8")
    run = study_on(tmp_path, translations={"vi": str(tmp_path / "known.jsonl")}).run("micro-llama", "vi", "sdrrl", 0)
    rows, report = sdrrl.training_mix(run, recipe_options(run.study, "sdrrl"), *base(run))
    from dsft.data import load_parallel

    reference = {row["id"]: row for row in load_parallel(run.study.data, "vi")}
    questions = [row for row in rows if row["languages"] == "tgt-tgt"]
    assert [(row["y_tgt"], row["y_en"]) for row in questions] == [(reference[row["id"].split("/")[0]]["y_tgt"], reference[row["id"].split("/")[0]]["y_en"]) for row in questions]
    assert report["answers"]["own, in other words"] == 0


# ---- in a study
def test_a_study_distils_and_trains_it_through_snakemake(tmp_path):
    study = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text(encoding="utf-8"))
    study |= {"models": {"micro-llama": {"path": "models/micro-llama"}}, "languages": ["zh"], "methods": ["sdrrl"], "layers": {"i": 1, "j": 4}}
    study |= {"data": {"items": 12, "max_length": 128}, "evaluation": {"items": 4}, "recipes": {"sdrrl": {"max_new_tokens": 12}}}
    study |= {"runs": str(tmp_path / "runs"), "figures": str(tmp_path / "figures")}
    study["train"] |= {"batch_size": 8, "per_device_batch_size": 8}
    path = tmp_path / "distilled.yaml"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    run = tmp_path / "runs" / "distilled" / "micro-llama" / "zh" / "sdrrl" / "seed0"
    target = os.path.relpath(run / "train_log.jsonl", ROOT)
    env = os.environ | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    command = ["snakemake", "--config", f"study={path}", "--nolock", "--cores", "2", "--quiet", "rules", "host", "--", target]
    result = subprocess.run(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 0, result.stdout[-4000:]
    rows = [json.loads(line) for line in (run / "recipe_rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 4 * 12 + 1 + 1
    report = json.loads((run / "data_report.json").read_text(encoding="utf-8"))
    assert report["tasks"] == {"question": 48, "translation": 1, "completion": 1}
    log = [json.loads(line) for line in (run / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert log[-1]["step"] == 7 and log[-1]["loss_tft"] > 0 == log[-1]["loss_lc"]
    assert (run / "model" / "model.safetensors").exists() and json.loads((run / "recipe_rows_report.json").read_text())["provenance"]["commit"]
