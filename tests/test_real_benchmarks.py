"""The real pieces of the benchmarks, read whole, and a few items of each asked by the same tasks as at the scale of the paper."""

import shutil
from pathlib import Path

import pytest
import transformers

from dsft import metrics, tasks
from dsft.benchmark_items import load_benchmark, load_items
from dsft.study import EvalParams, load_study

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "real"
OURS = ROOT / "tests" / "benchmarks"
SPLITS = {"mlqa": "dev", "xnli": "dev", "mmlu": "dev"}
real = pytest.mark.skipif(not REAL.exists(), reason="the folder ../shared/real with real benchmark pieces is not here")

# How many items the files hold, counted without this project: questions, lines, objects.
COUNTS = {
    "xquad": {"en": 632, "zh": 632, "vi": 632, "ar": 632},
    "mlqa": {"en": 1148, "zh": 504, "vi": 511, "ar": 517},
    "mkqa": {"en": 6, "zh": 6, "vi": 6, "ar": 6},
    "truthfulqa": {"zh": 788, "vi": 785, "ar": 773},
    "xnli": {"en": 800, "zh": 800, "vi": 800, "ar": 800},
    "xcopa": {"zh": 500, "vi": 500},
    "mmlu": {"zh": 271, "vi": 271, "ar": 274},
}


def params(names, folder=REAL, **changes) -> EvalParams:
    return EvalParams(benchmarks=names, source="files", data_dir=str(folder), splits=SPLITS, **changes)


@real
@pytest.mark.parametrize("name", COUNTS)
def test_every_item_is_read(name):
    found = {lang: load_benchmark(name, lang, params((name,))) for lang in ("en", "zh", "vi", "ar")}
    assert {lang: len(items[lang]) for lang, items in found.items() if items} == COUNTS[name]


@real
def test_what_the_items_say():
    truthful = load_items("truthfulqa", "zh", params(("truthfulqa",)))
    assert all(item["label"] == 0 for item in truthful)
    assert [n for n, item in enumerate(truthful) if item["choices"].count(item["choices"][0]) > 1] == [289, 692]
    for name in ("xquad", "mlqa"):
        assert all(item["answers"][0] in item["context"] for item in load_items(name, "ar", params((name,))))
    labels = [item["label"] for item in load_items("xnli", "vi", params(("xnli",)))]
    assert [labels.count(n) for n in (0, 1, 2)] == [266, 267, 267]
    same = [{item["id"] for item in load_items("xquad", lang, params(("xquad",), items=50))} for lang in ("en", "zh", "vi", "ar")]
    assert len(same[0]) == 50 and all(ids == same[0] for ids in same)
    kinds = [item["type"] for item in load_items("mkqa", "zh", params(("mkqa",)))]
    assert [k for k in kinds if k in ("long_answer", "unanswerable")] == ["long_answer", "unanswerable", "unanswerable"]


@real
@pytest.mark.parametrize(("code", "lang"), [("cmn", "zh"), ("vie", "vi"), ("ara", "ar")])
def test_any_aligned_texts_can_be_translated(tmp_path, code, lang):
    (tmp_path / "flores").mkdir()
    for ending, name in (("eng", "en"), (code, lang)):
        shutil.copy(REAL / "tatoeba" / f"tatoeba.{code}-eng.{ending}", tmp_path / "flores" / f"{name}.dev")
    evaluation = EvalParams(benchmarks=("flores",), source="files", data_dir=str(tmp_path), splits={"flores": "dev"})
    there, back = (load_items("flores", direction, evaluation) for direction in (f"en-{lang}", f"{lang}-en"))
    assert len(there) == len(back) == 1000
    assert all(a["source"] == b["answers"][0] and b["source"] == a["answers"][0] for a, b in zip(there, back))


def ask(tmp_path, evaluation, langs, folder=ROOT / "models" / "micro-llama"):
    study = load_study("smoke").model_copy(update={"runs": str(tmp_path), "evaluation": evaluation})
    study = study.model_copy(update={"data": study.data.model_copy(update={"template": "alpaca"})})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return tasks.evaluate(model, transformers.AutoTokenizer.from_pretrained(folder), study, langs)


@real
@pytest.mark.parametrize("lang", ["zh", "vi", "ar"])
def test_a_few_items_are_asked_both_ways(tmp_path, lang):
    names = tuple(name for name in COUNTS if lang in COUNTS[name])
    evaluation = params(names, prompt=("dsft", "harness"), items=3, batch_size=6, max_new_tokens=8)
    scores, samples = ask(tmp_path, evaluation, (lang,))
    asked = {(s["dataset"], s["prompt"], s["items"]) for s in scores if s["metric"] == metrics.BENCHMARKS[s["dataset"]].metric}
    assert asked == {(name, prompt, 3) for name in names for prompt in ("dsft", "harness") if (name, prompt) != ("mkqa", "harness")}
    assert all(0 <= s["value"] <= 100 for s in scores) and len(samples) == 3 * len(asked)


@real
@pytest.mark.parametrize("method", ["tft", "dsft_logits"])
def test_a_model_fine_tuned_on_real_alpaca_is_asked_every_benchmark(tmp_path, train_on_alpaca, method):
    run, _ = train_on_alpaca("zh", method)
    names = tuple(name for name in COUNTS if "zh" in COUNTS[name])
    scores, _ = ask(tmp_path / "real", params(names, items=3, batch_size=6, max_new_tokens=8), ("zh",), run.trained)
    more, _ = ask(tmp_path / "ours", params(("xstorycloze", "flores"), OURS, max_translation_tokens=8), ("zh",), run.trained)
    asked = {(s["dataset"], s["lang"]): s["items"] for s in scores + more if s["metric"] == metrics.BENCHMARKS[s["dataset"]].metric}
    assert asked == {(name, "zh"): 3 for name in names} | {("xstorycloze", "zh"): 5, ("flores", "en-zh"): 6, ("flores", "zh-en"): 6}


@pytest.mark.parametrize("prompt", ["dsft", "harness"])
def test_xstorycloze_and_flores_from_files_of_their_format(tmp_path, prompt):
    names = ("xstorycloze", "flores") if prompt == "dsft" else ("xstorycloze",)
    scores, samples = ask(tmp_path, params(names, OURS, prompt=(prompt,), max_translation_tokens=8), ("ar", "en"))
    counts = {(s["dataset"], s["lang"]): s["items"] for s in scores}
    expected = {("xstorycloze", "ar"): 5, ("xstorycloze", "en"): 5}
    assert counts == (expected | {("flores", "en-ar"): 6, ("flores", "ar-en"): 6} if prompt == "dsft" else expected)
