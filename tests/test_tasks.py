"""The benchmarks: their formats, the hub's columns, the prompts, the scores; and every kind of broken file in one line."""

import copy
import gzip
import itertools
import json
import logging
import math
import os
import random
import re
import stat
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from dsft import benchmark_items, metrics, tasks
from dsft.benchmark_items import SOURCES, check_benchmarks, load_items
from dsft.checks import check
from dsft.data import held_out_pairs, load_parallel
from dsft.files import ParamsError, read_rows
from dsft.metrics import BENCHMARKS
from dsft.microcosm import World
from dsft.prompts import HARNESS, TEMPLATES, WORDING
from dsft.study import DataParams, EvalParams, load_study

ROOT = Path(__file__).parents[1]
OURS = ROOT / "tests" / "benchmarks"  # XStoryCloze and FLORES
SPLITS = {"mlqa": "dev", "xnli": "dev"}


def squad(qas, context="小李养了一只猫，小王养了两只狗。"):
    return {"version": "1.1", "data": [{"title": "宠物", "paragraphs": [{"context": context, "qas": qas}]}]}


def qa(n, question, answer):
    return {"id": f"q{n}", "question": question, "answers": [{"text": answer, "answer_start": 0}]}


QAS = [qa(0, "小李养了什么？", "猫"), qa(1, "小王养了什么？", "狗"), qa(2, "谁养了猫？", "小李")]
MKQA = [
    {"example_id": 11, "query": "how big is the sun", "queries": {"zh_cn": "太阳有多大"},
     "answers": {"zh_cn": [{"type": "number_with_unit", "text": "1392000千米", "aliases": ["139万千米"]}]}},
    {"example_id": 12, "query": "how do i sleep well", "queries": {"zh_cn": "怎样睡好觉"}, "answers": {"zh_cn": [{"type": "long_answer", "text": None}]}},
    {"example_id": 13, "query": "is the moon round", "queries": {"zh_cn": "月亮是圆的吗"}, "answers": {"zh_cn": [{"type": "binary", "text": "yes", "aliases": None}]}},
]  # fmt: skip
TRUTHFUL = [
    {"question": "太阳是什么？", "mc1_targets_choices": ["一颗恒星", "一颗行星", "一盏灯"], "mc1_targets_labels": [1, 0, 0],
     "mc2_targets_choices": ["一颗恒星", "一颗行星", "一盏灯"], "mc2_targets_labels": [1, 0, 0]},
    {"question": "吃胡萝卜能治近视吗？", "mc1_targets_choices": ["不能", "能"], "mc1_targets_labels": [1, 0],
     "mc2_targets_choices": ["不能", "能"], "mc2_targets_labels": [1, 0]},
]  # fmt: skip
XNLI = "他在睡觉。\t他闭着眼睛。\tneutral\n他在睡觉。\t他醒着。\tcontradiction\n他在睡觉。\t有人在睡觉。\tentailment\n"
XCOPA = [
    {"premise": "街上很湿。", "choice1": "下雨了。", "choice2": "天很热。", "question": "cause", "label": 0, "idx": 0, "changed": False},
    {"premise": "他忘了带伞。", "choice1": "他吃饱了。", "choice2": "他淋湿了。", "question": "effect", "label": 1, "idx": 1, "changed": False},
]
MMLU = [
    {"instruction": "1 + 1 = ?", "option_a": "1", "option_b": "2", "option_c": "3", "option_d": "4", "answer": "B", "id": "sums/dev/0"},
    {"instruction": "哪个是行星？", "option_a": "太阳", "option_b": "月亮", "option_c": "北极星", "option_d": "火星", "answer": "D", "id": "sky/dev/0"},
]


def text(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def lines(rows) -> str:
    return "".join(text(row) + "\n" for row in rows)


FILES = {
    "xquad/xquad.zh.json": text(squad(QAS)),
    "mlqa/dev-context-zh-question-zh.json": text(squad(QAS)),
    "mkqa/mkqa.jsonl": lines(MKQA),
    "truthfulqa/zh_validation.json": text(TRUTHFUL),
    "xnli/dev-zh.tsv": XNLI,
    "xcopa/test.zh.jsonl": lines(XCOPA),
    "mmlu/zh_test.json": text(MMLU),
    **{str(p.relative_to(OURS)): p.read_text(encoding="utf-8") for p in OURS.glob("*/*.*")},
}
PLACE = {name.split("/")[0]: name for name in FILES} | {
    "xstorycloze": "xstorycloze/spring2016.val.zh.tsv.split_20_80_eval.tsv",
    "flores": "flores/zho_Hans.devtest",
}
DIRECTION = dict.fromkeys(BENCHMARKS, "zh") | {"flores": "en-zh"}


@pytest.fixture
def data_dir(tmp_path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path


def asked(folder, *names, **changes) -> EvalParams:
    return EvalParams(**{"benchmarks": names, "source": "files", "data_dir": str(folder), "splits": SPLITS, **changes})


def plain(items) -> list[dict]:
    return [{k: v for k, v in item.items() if k != "row"} for item in items]


# What a reader of the files above would write down, by hand.
EXPECTED = {
    "xquad": [{"id": "q1", "context": "小李养了一只猫，小王养了两只狗。", "question": "小王养了什么？", "answers": ["狗"]}, 1, 3],
    "mlqa": [{"id": "q2", "context": "小李养了一只猫，小王养了两只狗。", "question": "谁养了猫？", "answers": ["小李"]}, 2, 3],
    "mkqa": [{"id": "11", "question": "太阳有多大", "answers": ["1392000千米", "139万千米"], "type": "number_with_unit"}, 0, 3],
    "truthfulqa": [{"id": "1", "question": "吃胡萝卜能治近视吗？", "choices": ["不能", "能"], "label": 0}, 1, 2],
    "xnli": [{"id": "2", "premise": "他在睡觉。", "hypothesis": "有人在睡觉。", "label": 0}, 2, 3],
    "xcopa": [{"id": "1", "premise": "他忘了带伞。", "asks": "effect", "choices": ["他吃饱了。", "他淋湿了。"], "label": 1}, 1, 2],
    "xstorycloze": [
        {"id": "story-1", "story": "奥马尔在公园里捡到一个钱包。里面写着一个名字。他查到了电话号码。他马上给失主打了电话。",
         "choices": ["他把钱包扔进湖里，唱起歌来。", "失主拿回钱包，非常高兴。"], "label": 1}, 1, 5,
    ],
    "mmlu": [
        {"id": "sky/dev/0", "question": "哪个是行星？", "A": "太阳", "B": "月亮", "C": "北极星", "D": "火星", "choices": ["A", "B", "C", "D"], "label": 3}, 1, 2,
    ],
    "flores": [{"id": "3", "source": "The old bridge was built in 1887.", "answers": ["这座老桥建于1887年。"]}, 3, 6],
}  # fmt: skip


@pytest.mark.parametrize("name", BENCHMARKS)
def test_files_become_items(data_dir, name):
    item, n, count = EXPECTED[name]
    items = load_items(name, DIRECTION[name], asked(data_dir, name))
    assert len(items) == count and plain(items)[n] == item


def test_mkqa_without_a_short_answer_has_an_empty_reference(data_dir):
    assert load_items("mkqa", "zh", asked(data_dir, "mkqa"))[1]["answers"] == [""]


def test_mkqa_yes_is_also_yes_in_the_language(data_dir):
    assert load_items("mkqa", "zh", asked(data_dir, "mkqa"))[2]["answers"] == ["是", "yes"]


def test_mkqa_as_it_is_published_compressed(data_dir):
    path = data_dir / "mkqa" / "mkqa.jsonl"
    (data_dir / "mkqa" / "mkqa.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert len(load_items("mkqa", "zh", asked(data_dir, "mkqa"))) == 3


# The same items in the columns of the hub's datasets.
HUB = {
    "xquad": [{"id": q["id"], "context": "小李养了一只猫，小王养了两只狗。", "question": q["question"],
               "answers": {"text": [q["answers"][0]["text"]], "answer_start": [0]}} for q in QAS],
    "mkqa": [{"text": text(row)} for row in MKQA],
    "truthfulqa": [row | {"id": n} for n, row in enumerate(TRUTHFUL)],
    "xnli": [{"premise": "他在睡觉。", "hypothesis": h, "label": label} for h, label in (("他闭着眼睛。", 1), ("他醒着。", 2), ("有人在睡觉。", 0))],
    "xcopa": XCOPA,
    "xstorycloze": [
        {"story_id": f"story-{n}", **{f"input_sentence_{k}": row[k] for k in (1, 2, 3, 4)}, "sentence_quiz1": row[5], "sentence_quiz2": row[6],
         "answer_right_ending": int(row[7])}
        for n, row in enumerate(line.split("\t") for line in FILES[PLACE["xstorycloze"]].splitlines()[1:])
    ],
    "mmlu": MMLU,
}  # fmt: skip
HUB["mlqa"] = HUB["xquad"]
FLORES = {"eng_Latn": "flores/eng_Latn.devtest", "cmn_Hans": "flores/zho_Hans.devtest"}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_hub_gives_the_same_items_as_files(data_dir, monkeypatch, name):
    called = []

    def load_dataset(path, config=None, split=None, **options):
        called.append((path, config, split))
        rows = [{"text": line} for line in FILES[FLORES[config]].splitlines()] if name == "flores" else HUB[name]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(benchmark_items, "load_dataset", load_dataset)
    found = load_items(name, DIRECTION[name], EvalParams(benchmarks=(name,), source="hub", splits=SPLITS))
    assert plain(found) == plain(load_items(name, DIRECTION[name], asked(data_dir, name)))
    expected = {"xquad": ("google/xquad", "xquad.zh", "validation"), "mlqa": ("facebook/mlqa", "mlqa.zh.zh", "validation")}
    assert name not in expected or called == [expected[name]]


def test_a_dataset_that_is_a_script_is_read_from_the_hubs_own_tables(monkeypatch):
    called = []

    def load_dataset(path, config=None, split=None, data_files=None):
        called.append(data_files)
        if path != "parquet":
            raise RuntimeError("Dataset scripts are no longer supported, but found xcopa.py")
        return datasets.Dataset.from_list(XCOPA)

    monkeypatch.setattr(benchmark_items, "load_dataset", load_dataset)
    assert len(load_items("xcopa", "zh", EvalParams(benchmarks=("xcopa",), source="hub"))) == 2
    assert called[1] == "hf://datasets/cambridgeltl/xcopa@refs/convert/parquet/zh/test/*.parquet"


def test_no_connection_is_one_line(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ParamsError) as error:
        load_items("xnli", "zh", EvalParams(benchmarks=("xnli",), source="hub"))
    assert str(error.value).startswith("facebook/xnli (zh, test) on the hub cannot be loaded: ") and "source: files" in str(error.value)
    assert "\n" not in str(error.value)


def test_one_broken_row_of_a_hub_dataset_is_left_out_and_said(monkeypatch, capsys):
    rows = [MMLU[0] | {"id": f"sums/{n}"} for n in range(200)]
    rows[7] = rows[7] | {"option_c": None}
    monkeypatch.setattr(benchmark_items, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    params = EvalParams(benchmarks=("mmlu",), source="hub")
    assert len(load_items("mmlu", "zh", params)) == 199
    assert "1 of 200 rows left out, the first because of row 7: option_c = None: must be text" in capsys.readouterr().out
    rows[8], rows[9] = rows[8] | {"answer": "E"}, rows[9] | {"id": "sums/0"}
    with pytest.raises(ParamsError, match="row 7: option_c"):
        load_items("mmlu", "zh", params)


def test_a_sample_is_the_same_in_every_language_and_no_first_part(data_dir):
    ids = [f"q{n}" for n in range(300)]
    chosen = {}
    for lang, order, question in (("zh", ids, "谁？"), ("vi", ids[::-1], "Ai đã đến?")):
        content = squad([qa(0, question, "1") | {"id": key} for key in order], context=question)
        (data_dir / "xquad" / f"xquad.{lang}.json").write_text(text(content), encoding="utf-8")
        chosen[lang] = [item["id"] for item in load_items("xquad", lang, asked(data_dir, "xquad", items=30))]
        assert chosen[lang] == [key for key in order if key in chosen[lang]]
    assert sorted(chosen["zh"]) == sorted(chosen["vi"]) and len(chosen["zh"]) == 30
    assert any(int(key[1:]) > 250 for key in chosen["zh"])


def test_ids_that_a_gap_made_fractions_are_the_same_ids(data_dir):
    ids = lambda *values: [item["id"] for item in xcopa_items(data_dir, values)]
    assert ids(0, 1) == ids(0.0, 1.0) == ids("0", "1") == ["0", "1"]
    assert ids(None, 7.0) == ids(float("nan"), 7) == ["0", "7"]  # a row without an id has its number


def xcopa_items(data_dir, ids):
    (data_dir / PLACE["xcopa"]).write_text(lines(row | {"idx": n} for row, n in zip(XCOPA, ids)), encoding="utf-8")
    return load_items("xcopa", "zh", asked(data_dir, "xcopa"))


def test_a_dataset_without_rows_is_one_line(monkeypatch):
    monkeypatch.setattr(benchmark_items, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"premise": []}))
    with pytest.raises(ParamsError, match=r"cambridgeltl/xcopa \(zh, test\) on the hub: holds no rows"):
        load_items("xcopa", "zh", EvalParams(benchmarks=("xcopa",), source="hub"))


# ---- broken files: kind, benchmark, how the good file is broken, what the one line says
def change(rows, n, **fields):
    return [row | (fields if k == n else {}) for k, row in enumerate(rows)]


BROKEN = [
    ("truncated JSON", "xquad", lambda s: s[: len(s) // 2], "xquad.zh.json: not readable as JSON"),
    ("truncated JSON lines", "xcopa", lambda s: s[:-20], "test.zh.jsonl: not readable as JSON: line 2, column"),
    ("not UTF-8", "xnli", lambda s: s.encode("gb18030"), "dev-zh.tsv: not in UTF-8"),
    ("byte order mark", "xnli", lambda s: "\ufeff" + s, "byte order mark"),
    ("empty file", "xcopa", lambda s: "", "at least one"),
    ("an object for the list", "mmlu", lambda s: '{"data": []}', "row 0: option_a is missing"),
    ("a list of texts", "mmlu", lambda s: '["A", "B"]', "must hold a list of objects"),
    ("half a surrogate pair", "xquad", lambda s: s.replace("谁养了猫", "谁养了 \\ud83d"), "question = '\\u8c01\\u517b\\u4e86 \\ud83d"),
    ("zero-width text", "mlqa", lambda s: text(squad([qa(0, "\u200b", "猫")])), "question = "),
    ("SQuAD without qas", "xquad", lambda s: s.replace('"qas"', '"questions"'), "not in SQuAD's format"),
    ("answers null", "xquad", lambda s: text(squad([QAS[0] | {"answers": None}])), "not in SQuAD's format"),
    ("no answers", "xquad", lambda s: text(squad([QAS[0], QAS[1] | {"answers": []}])), "row 1: answers = []: must be a list of texts"),
    ("empty answer", "mlqa", lambda s: text(squad([qa(0, "谁？", " ")])), "row 0: answers = ' ': must be text"),
    ("empty context", "mlqa", lambda s: text(squad(QAS, context="")), "row 0: context = '': must be text"),
    ("duplicate ids", "mlqa", lambda s: text(squad([QAS[0], QAS[0]])), "row 1: id = 'q0' stands twice"),
    ("100k characters", "xquad", lambda s: text(squad(QAS, context="猫" * 100_000)), "context has 100,000 characters"),
    ("MKQA without queries", "mkqa", lambda s: lines(change(MKQA, 1, queries=None)), "row 1: queries has no 'zh'"),
    ("MKQA in other languages", "mkqa", lambda s: s.replace("zh_cn", "ko"), "row 0: queries has no 'zh'"),
    ("MKQA's unknown type", "mkqa", lambda s: s.replace("binary", "yesno"), "row 2: type = 'yesno': must be one of entity"),
    ("MKQA without text", "mkqa", lambda s: s.replace('"yes"', "null"), "row 2: answers.zh_cn = None: must be text"),
    ("null choices", "truthfulqa", lambda s: text(change(TRUTHFUL, 0, mc1_targets_choices=None)), "mc1_targets_choices = None: must be a list"),
    ("null choice", "truthfulqa", lambda s: text(change(TRUTHFUL, 1, mc1_targets_choices=["能", None])), "row 1: mc1_targets_choices = None"),
    ("two true answers", "truthfulqa", lambda s: text(change(TRUTHFUL, 0, mc1_targets_labels=[1, 1, 0])), "must have a single 1"),
    ("labels one short", "truthfulqa", lambda s: text(change(TRUTHFUL, 0, mc1_targets_labels=[1, 0])), "must have a single 1"),
    ("a single choice", "truthfulqa", lambda s: text(change(TRUTHFUL, 0, mc1_targets_choices=["星"], mc1_targets_labels=[1])), "fewer than two"),
    ("wrong label name", "xnli", lambda s: s.replace("neutral", "contradictory"), "row 0: label = 'contradictory': must be one of entailment, neutral"),
    ("a header", "xnli", lambda s: "premise\thypothesis\tlabel\n" + s, "row 0: label = 'label'"),
    ("a column missing", "xnli", lambda s: s.replace("\tneutral", ""), "row 0: 2 columns between tabs, expected 3"),
    ("label out of range", "xcopa", lambda s: lines(change(XCOPA, 1, label=2)), "row 1: label = 2: must be one of 0, 1"),
    ("label as truth value", "xcopa", lambda s: lines(change(XCOPA, 1, label=True)), "row 1: label = True"),
    ("unknown question", "xcopa", lambda s: s.replace("effect", "result"), "row 1: question = 'result': must be one of cause, effect"),
    ("a line that is a list", "xcopa", lambda s: s + "[1]\n", "must hold a list of objects"),
    ("other header", "xstorycloze", lambda s: s.replace("InputStoryid", "id"), "the header must be InputStoryid"),
    ("ending 3", "xstorycloze", lambda s: s.replace("\t1\n", "\t3\n", 1), "row 0: answer_right_ending = 3: must be one of 1, 2"),
    ("ending in words", "xstorycloze", lambda s: s.replace("\t2\n", "\ttwo\n", 1), "row 1: answer_right_ending = 'two'"),
    ("answer E", "mmlu", lambda s: text(change(MMLU, 1, answer="E")), "row 1: answer = 'E': must be one of A, B, C, D"),
    ("option missing", "mmlu", lambda s: s.replace("option_d", "option_e"), "row 0: option_d is missing"),
    ("one sentence too few", "flores", lambda s: s[: s.rindex("她")], "zho_Hans.devtest: 5 sentences, but"),
    ("texts changed over", "flores", lambda s: FILES["flores/vie_Latn.devtest"], "zho_Hans.devtest: is to be in 'zh', but only 0 % of the rows"),
    ("another language", "xcopa", lambda s: lines(row | {"premise": "Trời mưa rất to."} for row in XCOPA), "is to be in 'zh', but only 0 %"),
    ("an empty sentence", "flores", lambda s: "\n" + s.split("\n", 1)[1], "row 0: target = '': must be text"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "broken", "said"), [pytest.param(*rest, id=kind) for kind, *rest in BROKEN])
def test_a_broken_file_is_one_line(data_dir, name, broken, said):
    path = data_dir / PLACE[name]
    content = broken(path.read_text(encoding="utf-8"))
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ParamsError) as error:
        check_benchmarks(asked(data_dir, name), ("zh",))
    assert said in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("lang", "changes", "said"),
    [
        ("zh", {"splits": {"mlqa": "train"}}, "evaluation.splits.mlqa = 'train': no such split; choose from test, dev"),
        ("zh", {"splits": {"mlqa": "test"}}, "needs the file mlqa/test-context-zh-question-zh.json or "),
        ("vi", {}, "MLQA in 'vi' needs the file mlqa/dev-context-vi-question-vi.json or "),
        ("ja", {}, "dsft/benchmarks/prompts.yaml: mlqa has no wording in 'ja', only in en, zh, vi, ar, zh-Hant; add it there"),
        ("zh", {"data_dir": "nowhere"}, "evaluation.data_dir = 'nowhere': no such folder"),
    ],
)
def test_a_missing_file_is_one_line(data_dir, lang, changes, said):
    with pytest.raises(ParamsError) as error:
        check_benchmarks(asked(data_dir, "mlqa", **changes), (lang,))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"benchmarks": ["squad"]}, "evaluation.benchmarks.0 = 'squad'"),
        ({"benchmarks": ["xnli", "xnli"]}, "`benchmarks` must name at least one, and each once"),
        ({"source": "files"}, "`data_dir` names the folder of source: files"),
        ({"prompt": ["harness"]}, "need the real benchmarks"),
        ({"source": "hub", "prompt": ["lm-eval"]}, "evaluation.prompt.0 = 'lm-eval'"),
    ],
)
def test_a_mistake_in_the_study_is_one_line(tmp_path, changes, said):
    study = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text(encoding="utf-8")) | {"evaluation": changes}
    (tmp_path / "mistaken.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    with pytest.raises(ParamsError) as error:
        load_study(tmp_path / "mistaken.yaml")
    assert said in str(error.value)


def test_dsft_check_reads_the_benchmarks_before_anything_runs(data_dir, tmp_path):
    study = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text(encoding="utf-8"))
    study |= {"languages": ["zh"], "evaluation": asked(data_dir, "xnli", "mlqa").model_dump(mode="json", exclude_defaults=True)}
    path = tmp_path / "checked.yaml"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    check(str(path))
    (data_dir / PLACE["xnli"]).write_text(XNLI.replace("neutral", "neither"), encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        check(str(path))
    assert str(stopped.value).startswith("dsft: ") and "label = 'neither'" in str(stopped.value)


# ---- prompts and tasks
def test_every_benchmark_has_a_wording_in_every_language():
    assert set(WORDING) == set(BENCHMARKS) == set(SOURCES)
    for name, languages in WORDING.items():
        assert set(languages) == {"en", "zh", "vi", "ar", "zh-Hant"} - ({"en"} if name == "flores" else set())
        assert all(set(entry) <= {"instruction", "input", "choices"} for entry in languages.values())


def study_on(folder, tmp_path, *names, **changes):
    study = load_study("smoke")
    return study.model_copy(update={"runs": str(tmp_path / "runs"), "evaluation": asked(folder, *names, **changes)})


def with_alpaca(study):
    return study.model_copy(update={"data": study.data.model_copy(update={"template": "alpaca"})})


def as_lm_eval_asks(task: tasks.Task) -> list[tuple[str, list[str]]]:
    """The prompts and choices of a written task, by lm-eval's own loading of its files."""
    loaded = TaskManager(include_path=str(task.folder), include_defaults=False).load([task.name])["tasks"][task.name]
    docs = list(loaded.test_docs())
    return [(loaded.doc_to_text(doc), loaded.doc_to_choice(doc) if loaded.OUTPUT_TYPE == "multiple_choice" else []) for doc in docs]


# lm-eval's own prompts, written out by hand for the files above.
HARNESS = {
    "xquad": ("语境: 小李养了一只猫，小王养了两只狗。\n\n问题: 小李养了什么？\n\n回答:", []),
    "mlqa": ("Context: 小李养了一只猫，小王养了两只狗。\n\nQuestion: 小李养了什么？\n\nAnswer:", []),
    "xnli": ("", [f"他在睡觉。, 正确? {word}, 他闭着眼睛。" for word in ("是的", "所以", "不是的")]),
    "xcopa": ("街上很湿 因为", ["下雨了。", "天很热。"]),
    "mmlu": ("1 + 1 = ?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:", ["A", "B", "C", "D"]),
    "xstorycloze": ("小梅想烤一个蛋糕。 家里没有鸡蛋了。 商店快要关门了。 她一路跑了过去。", ["她带着一打鸡蛋回了家。", "她在车站给花浇水。"]),
}


@pytest.mark.parametrize("name", HARNESS)
def test_harness_asks_with_lm_evals_own_words(data_dir, tmp_path, name):
    (task,) = tasks.write_tasks(study_on(data_dir, tmp_path, name, prompt=("harness",)), "zh")
    assert as_lm_eval_asks(task)[0] == HARNESS[name]


def test_harness_asks_truthfulqa_with_english_examples(data_dir, tmp_path):
    (task,) = tasks.write_tasks(study_on(data_dir, tmp_path, "truthfulqa", prompt=("harness",)), "zh")
    prompt, choices = as_lm_eval_asks(task)[0]
    assert prompt.startswith("Q: What is human life expectancy") and prompt.endswith("\n\nQ: 太阳是什么？\nA:")
    assert choices == ["一颗恒星", "一颗行星", "一盏灯"]


def test_our_prompt_in_the_alpaca_template(data_dir, tmp_path):
    (task,) = tasks.write_tasks(with_alpaca(study_on(data_dir, tmp_path, "xnli")), "zh")
    prompt, choices = as_lm_eval_asks(task)[0]
    assert prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n根据前提，假设是否成立？请回答“是”、“可能”或“否”。\n\n### Input:\n前提：他在睡觉。\n假设：他闭着眼睛。\n\n### Response:"
    )
    assert choices == ["是", "可能", "否"]
    assert [row["label"] for row in task.rows] == [1, 2, 0]


@pytest.mark.parametrize("end", ["\u2028", "\x85"])
def test_only_a_newline_ends_a_row(data_dir, tmp_path, end):
    (data_dir / PLACE["mkqa"]).write_text(lines(MKQA).replace("太阳有多大", f"太阳{end}有多大"), encoding="utf-8")
    (task,) = tasks.write_tasks(study_on(data_dir, tmp_path, "mkqa"), "zh")
    assert len(as_lm_eval_asks(task)) == len(task.rows) == 3 and f"太阳{end}有多大" in as_lm_eval_asks(task)[0][0]


def test_what_does_not_exist_is_said(data_dir, tmp_path, capsys):
    study = study_on(data_dir, tmp_path, "xcopa", "xstorycloze", "mkqa", prompt=("dsft", "harness"))
    assert [t.name for t in tasks.write_tasks(study, "zh")] == ["xcopa_zh", "xcopa_zh_harness", "xstorycloze_zh", "xstorycloze_zh_harness", "mkqa_zh"]
    tasks.write_tasks(study.model_copy(update={"evaluation": asked(data_dir, "xcopa")}), "ar")
    tasks.write_tasks(study.model_copy(update={"evaluation": asked(data_dir, "xcopa")}), "en")
    said = capsys.readouterr().out
    assert "lm-eval has no task for MKQA in 'zh'" in said and "XCOPA does not exist in 'ar'" in said and "XCOPA is not asked in English" in said


# ---- evaluation of a tiny model
@pytest.fixture(scope="module")
def small():
    """A model with random weights and few positions, and the microcosm's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "models" / "micro-llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval(), tokenizer


def likelihood(model, tokenizer, prompt: str, answer: str) -> float:
    """log P(answer | prompt), token by token, without lm-eval."""
    x = [tokenizer.bos_token_id] + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = x + tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logits[t - 1, ids[t]].item() for t in range(len(x), len(ids)))


@pytest.mark.parametrize("name", ["xstorycloze", "xnli", "truthfulqa", "xcopa", "mmlu"])
def test_choices_are_scored_by_their_likelihood(data_dir, tmp_path, small, name):
    study = study_on(data_dir, tmp_path, name)
    (score, bits), samples = tasks.evaluate(*small, study, ("zh",))
    (task,) = tasks.write_tasks(study, "zh")
    right = []
    for row, sample in zip(task.rows, samples, strict=True):
        expected = [likelihood(*small, row["prompt"], choice) for choice in row["choices"]]
        assert sample["likelihoods"] == pytest.approx(expected, abs=2e-3)
        right.append(expected.index(max(expected)) == row["label"])
        gold = row["choices"][row["label"]]
        assert sample["value"] == right[-1] and sample["reference"] == gold
        assert sample["bits_per_byte"] == pytest.approx(-expected[row["label"]] / math.log(2) / len(gold.encode()), abs=2e-3)
    assert score["value"] == pytest.approx(100 * sum(right) / len(right), abs=1e-3)
    assert score["metric"] == ("mc1" if name == "truthfulqa" else "acc") and score["items"] == len(right)
    assert score["chance"] == pytest.approx(100 * sum(1 / len(row["choices"]) for row in task.rows) / len(right), abs=1e-3)
    assert (bits["metric"], bits["items"], bits["chance"]) == ("bits_per_byte", len(right), None)
    assert bits["value"] == pytest.approx(sum(s["bits_per_byte"] for s in samples) / len(right), abs=1e-3)


@given(st.lists(st.tuples(st.sampled_from("甲乙丙丁"), st.sampled_from([-3.0, -2.0, -1.0])), min_size=2, max_size=6), st.randoms())
def test_mc1_does_not_depend_on_the_order_of_the_choices(choices, rng: random.Random):
    def value(order):
        doc = {"choices": [choices[n][0] for n in order], "label": order.index(0)}
        return tasks.mc1_results(doc, [(choices[n][1], False) for n in order])["mc1"]

    order = list(range(len(choices)))
    shuffled = rng.sample(order, len(order))
    assert value(order) == value(shuffled)
    assert sum(tasks.mc1_results({"choices": [c for c, _ in choices], "label": k}, [(v, False) for _, v in choices])["mc1"] for k in order) == pytest.approx(1)


def test_both_prompts_are_reported(data_dir, tmp_path, small):
    scores, samples = tasks.evaluate(*small, study_on(data_dir, tmp_path, "xquad", "xnli", prompt=("dsft", "harness"), max_new_tokens=4), ("zh",))
    assert [(s["dataset"], s["prompt"], s["metric"], s["items"]) for s in scores] == [
        (dataset, prompt, metric, 3) for dataset, main in (("xquad", "f1"), ("xnli", "acc")) for prompt in ("dsft", "harness") for metric in (main, "bits_per_byte")
    ]
    for prompt, dataset in itertools.product(("dsft", "harness"), ("xquad", "xnli")):
        rows = [s for s in samples if (s["prompt"], s["dataset"]) == (prompt, dataset)]
        reported = next(s["value"] for s in scores if (s["prompt"], s["dataset"]) == (prompt, dataset))
        assert len(rows) == 3 and reported == pytest.approx(100 * sum(r["value"] for r in rows) / 3, abs=1e-3)


def test_mkqa_is_reported_with_and_without_the_unanswerable(data_dir, tmp_path, small):
    scores, samples = tasks.evaluate(*small, study_on(data_dir, tmp_path, "mkqa", max_new_tokens=4), ("zh",))
    assert [(s["metric"], s["items"]) for s in scores] == [("f1", 3), ("f1_answerable", 2), ("bits_per_byte", 2)]
    assert ["bits_per_byte" in s for s in samples] == [True, False, True]
    assert [s["type"] for s in samples] == ["number_with_unit", "long_answer", "binary"]
    assert scores[1]["value"] == pytest.approx(100 * (samples[0]["value"] + samples[2]["value"]) / 2, abs=1e-3)


def test_prompts_that_do_not_fit_are_counted(data_dir, tmp_path, small, capsys):
    model, tokenizer = small
    contexts = ["猫" * 20, "猫" * 900, "狗" * 901]
    content = squad([])
    content["data"][0]["paragraphs"] = [{"context": c, "qas": [qa(n, "谁？", c[0])]} for n, c in enumerate(contexts)]
    (data_dir / PLACE["xquad"]).write_text(text(content), encoding="utf-8")
    study = study_on(data_dir, tmp_path, "xquad", max_new_tokens=4)
    (score, bits), _ = tasks.evaluate(model, tokenizer, study, ("zh",))
    (task,) = tasks.write_tasks(study, "zh")
    fits = [len(tokenizer(row["prompt"])["input_ids"]) + 4 <= 512 for row in task.rows]
    assert fits == [True, False, False] and score["truncated"] == bits["truncated"] == 2
    assert "xquad_zh: 2 of 3 prompts were longer than the 512 positions of the model and lost their beginning" in capsys.readouterr().out


def test_a_choice_longer_than_the_model_is_one_line(data_dir, tmp_path, small):
    (data_dir / PLACE["xcopa"]).write_text(lines(change(XCOPA, 1, choice1="他" * 2000)), encoding="utf-8")
    with pytest.raises(ParamsError, match="xcopa_zh: item 1: a choice is longer than the 512 positions"):
        tasks.evaluate(*small, study_on(data_dir, tmp_path, "xcopa"), ("zh",))


# ---- examples in the prompt
OTHER = {"mlqa": ("test", "dev"), "xnli": ("test", "dev"), "xcopa": ("test", "val"), "xstorycloze": ("eval", "train"), "mmlu": ("test", "dev"), "flores": ("devtest", "dev")}


def numbered(name: str, numbers: list[int]) -> str:
    """A file of a benchmark whose items have a number, 〔n〕, in what they ask; an item that stands there twice has two ids."""
    story = "\t".join(benchmark_items.STORY_HEADER) + "\n"
    return {
        "xquad": lambda: text(squad([qa(f"{k}-{n}", f"〔{n}〕谁来了？", "小李") for k, n in enumerate(numbers)])),
        "mlqa": lambda: text(squad([qa(f"{k}-{n}", f"〔{n}〕谁来了？", "小李") for k, n in enumerate(numbers)])),
        "mkqa": lambda: lines(MKQA[0] | {"example_id": k, "queries": {"zh_cn": f"〔{n}〕有多大"}} for k, n in enumerate(numbers)),
        "truthfulqa": lambda: text([TRUTHFUL[0] | {"question": f"〔{n}〕是什么？"} for n in numbers]),
        "xnli": lambda: "".join(f"他在〔{n}〕号睡觉。\t他醒着。\tcontradiction\n" for n in numbers),
        "xcopa": lambda: lines(XCOPA[n % 2] | {"premise": f"〔{n}〕号街上很湿。", "idx": k} for k, n in enumerate(numbers)),
        "xstorycloze": lambda: story + "".join(f"{k}\t〔{n}〕号来了。\t他饿了。\t他找饭。\t他吃饭。\t他饱了。\t他走了。\t1\n" for k, n in enumerate(numbers)),
        "mmlu": lambda: text([MMLU[n % 2] | {"instruction": f"〔{n}〕是什么？", "id": f"{k}"} for k, n in enumerate(numbers)]),
        "flores": lambda: "".join(f"第〔{n}〕号博物馆早上九点开门。\n" for n in numbers),
    }[name]()  # fmt: skip


def shot_files(folder: Path, name: str) -> None:
    """Nine items to ask, one of them twice, and where there is another split, nine others and two that are asked."""
    for split, numbers in zip(OTHER.get(name, (next(iter(SOURCES[name].splits)),)), ([*range(8), 0], [*range(100, 109), 3, 5])):
        for lang, code in (("zh", "zho_Hans"), *([("en", "eng_Latn")] if name == "flores" else [])):
            path = folder / name / SOURCES[name].files[0].format(lang=lang, code=code, split=split)
            path.parent.mkdir(exist_ok=True)
            content = numbered(name, numbers) if lang == "zh" else "".join(f"Museum 〔{n}〕 opens at nine in the morning.\n" for n in numbers)
            path.write_text(content, encoding="utf-8")


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("name", "prompt"), [*((name, "dsft") for name in BENCHMARKS), *((name, "harness") for name in HARNESS)])
def test_no_prompt_holds_the_item_that_it_asks(data_dir, tmp_path, name, prompt, k):
    """Over all items, by lm-eval's own prompts with k examples; what is asked stands there once or, of XNLI in lm-eval's way, only in the choices."""
    shot_files(data_dir, name)
    written = tasks.write_tasks(study_on(data_dir, tmp_path, name, prompt=(prompt,), num_fewshot=k, splits={}), "zh")
    for task in written:
        loaded = TaskManager(include_path=str(task.folder), include_defaults=False).load([task.name])["tasks"][task.name]
        assert loaded.config.fewshot_split == (OTHER[name][1] if name in OTHER else "test")
        loaded.set_fewshot_seed(1234)
        docs, number = list(loaded.test_docs()), re.compile(r"〔(\d+)〕")
        said = 2 if name == "flores" else 1  # its answer has the number as well
        assert len(docs) == 9
        for doc in docs * 3:
            (own,) = set(number.findall(doc["asked"]))
            alone, found = (number.findall(loaded.fewshot_context(doc, num_fewshot=shots)) for shots in (0, k))
            assert found.count(own) == alone.count(own) <= 1
            assert len(found) - len(alone) == said * k and (name not in OTHER or all(int(n) >= 100 for n in found if n != own))


def test_where_the_other_split_is_not_there_the_asked_one_is_drawn_from(data_dir, tmp_path, capsys):
    study = study_on(data_dir, tmp_path, "xstorycloze", num_fewshot=3)
    (task,) = tasks.write_tasks(study, "zh")
    assert task.splits == ("test",)
    assert "XStoryCloze in 'zh': " in (said := capsys.readouterr().out) and "has no file of train; examples in prompts are other items of the asked split" in said


@pytest.mark.parametrize("name", ["xstorycloze", "mlqa"])
def test_too_few_examples_are_told_before_a_study(data_dir, name):
    with pytest.raises(ParamsError, match=rf"evaluation.num_fewshot = 9: {name} in 'zh' has only \d examples beside what is asked; ask for fewer"):
        check_benchmarks(asked(data_dir, name, num_fewshot=9), ("zh",))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_microcosm_takes_its_examples_from_other_meanings(tmp_path, name):
    study = load_study("smoke")
    study = study.model_copy(update={"runs": str(tmp_path), "evaluation": study.evaluation.model_copy(update={"benchmarks": (name,), "num_fewshot": 5, "items": 60})})
    for task in tasks.write_tasks(study, "zh"):
        assert task.splits == ("test", "dev")
        shots = read_rows(task.files["dev"])
        assert len(shots) >= 5 and {row["asked"] for row in shots}.isdisjoint(row["asked"] for row in task.rows)


def spied_on(monkeypatch) -> list[dict]:
    """What lm-eval logs of all items that it will be asked."""
    logged, run = [], tasks.simple_evaluate

    def listening(*arguments, **options):
        results = run(*arguments, **options)
        logged.extend(sample for samples in results["samples"].values() for sample in samples)
        return results

    monkeypatch.setattr(tasks, "simple_evaluate", listening)
    return logged


def test_few_shot_examples_stand_before_the_question(data_dir, tmp_path, small, monkeypatch):
    logged = spied_on(monkeypatch)
    study = study_on(data_dir, tmp_path, "xcopa", num_fewshot=1)
    tasks.evaluate(*small, study, ("zh",))
    rows = tasks.write_tasks(study, "zh")[0].rows
    assert logged[0]["arguments"][0][0] == rows[1]["prompt"] + rows[1]["choices"][1] + "\n\n" + rows[0]["prompt"]


def test_no_question_of_the_microcosm_is_answered_in_its_own_prompt(tmp_path, small, monkeypatch):
    logged = spied_on(monkeypatch)
    study = load_study("smoke")
    changes = {"benchmarks": ("xcopa", "xquad"), "num_fewshot": 5, "items": 40, "max_new_tokens": 2}
    study = study.model_copy(update={"runs": str(tmp_path), "evaluation": study.evaluation.model_copy(update=changes)})
    tasks.evaluate(*small, study, ("zh",))
    assert len(logged) == 3 * 40 and all(sample["arguments"][0][0].count(sample["doc"]["asked"]) == 1 for sample in logged)


def test_what_lm_eval_warns_of_is_shown_once(data_dir, tmp_path, small, capsys):
    for _ in range(2):
        tasks.evaluate(*small, study_on(data_dir, tmp_path, "xcopa"), ("zh",))
        for length in (600, 700):
            logging.getLogger("lm_eval.models.huggingface").warning("A remark on %s tokens, known to this test only", length)
    assert capsys.readouterr().err.count("known to this test only") == 1


@pytest.mark.parametrize("folder", ["a[1]", "b{x}", "c*?"])
def test_a_run_folder_is_a_path_and_no_pattern_and_no_cache_is_needed(data_dir, tmp_path, small, monkeypatch, folder):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("read through datasets and its cache"))
    study = study_on(data_dir, tmp_path / folder, "xcopa", prompt=("dsft", "harness"), num_fewshot=1)
    scores, _ = tasks.evaluate(*small, study, ("zh",))
    assert [(score["metric"], score["items"]) for score in scores] == [("acc", 2), ("bits_per_byte", 2)] * 2


# ---- other backends
def test_other_backends_by_name(data_dir, tmp_path, small):
    model, tokenizer = small
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    names = ("xcopa", "xquad")
    in_memory = tasks.evaluate(model, tokenizer, study_on(data_dir, tmp_path, *names, max_new_tokens=4), ("zh",))
    changes = {"backend": "huggingface", "device": "cpu", "batch_size": 1, "backend_args": {"max_length": 512}, "max_new_tokens": 4}
    by_name = tasks.evaluate(str(tmp_path / "model"), tokenizer, study_on(data_dir, tmp_path, *names, **changes), ("zh",))
    assert by_name[0] == in_memory[0]
    changes = {"backend": "hf", "batch_size": 4, "max_new_tokens": 4}  # on the GPU if there is one, else on the CPU
    assert tasks.evaluate(tmp_path / "model", tokenizer, study_on(data_dir, tmp_path, *names, **changes), ("zh",))[0] == in_memory[0]
    assert [s["prediction"] for s in by_name[1]] == [s["prediction"] for s in in_memory[1]]
    with pytest.raises(ParamsError, match="evaluation.backend = 'vlm': lm-eval cannot start it"):
        tasks.evaluate(str(tmp_path / "model"), tokenizer, study_on(data_dir, tmp_path, "xcopa", backend="vlm"), ("zh",))
    with pytest.raises(ParamsError, match="evaluation.backend = 'hf': lm-eval cannot start it on .*nowhere"):
        tasks.evaluate(str(tmp_path / "nowhere"), tokenizer, study_on(data_dir, tmp_path, "xcopa"), ("zh",))


# ---- bits a byte
def bits(model, tokenizer, prompt: str, answer: str) -> float:
    """-log2 P(answer | prompt) a byte, from the logits of one forward pass over all of it."""
    x, y = tokenizer(prompt)["input_ids"], tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        log_p = model(torch.tensor([x + y])).logits[0].float().log_softmax(-1)
    return -sum(log_p[len(x) + n - 1, token].item() for n, token in enumerate(y)) / math.log(2) / len(answer.encode("utf-8"))


def with_data(study, **changes):
    return study.model_copy(update={"data": study.data.model_copy(update={"template": "alpaca", **changes})})


@pytest.fixture(scope="module")
def in_bytes(small):
    """A model that reads bytes, so that the tokens of prompt and answer are those of both together."""
    backend = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1} | {b: n + 2 for n, b in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=2048,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval(), tokenizer


GOLD = {  # the first of the answers, or the right choice, of each item
    "xquad": ["猫", "狗", "小李"],
    "mlqa": ["猫", "狗", "小李"],
    "mkqa": ["1392000千米", None, "是"],  # no short answer, nothing to score; and the word of the language
    "truthfulqa": ["一颗恒星", "不能"],
    "xnli": ["可能", "否", "是"],
    "xcopa": ["下雨了。", "他淋湿了。"],
    "mmlu": ["B", "D"],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bits_a_byte_of_the_right_answer(data_dir, tmp_path, in_bytes, dtype):
    """Of generated answers and of choices, against one plain forward pass for each."""
    model, tokenizer = copy.deepcopy(in_bytes[0]).to(dtype), in_bytes[1]
    study = with_alpaca(study_on(data_dir, tmp_path, *GOLD, max_new_tokens=2))
    scores, samples = tasks.evaluate(model, tokenizer, study, ("zh",))
    prompts = {task.dataset: [row["prompt"] for row in task.rows] for task in tasks.write_tasks(study, "zh")}
    for name, gold in GOLD.items():
        expected = [None if answer is None else bits(model, tokenizer, prompt, answer) for prompt, answer in zip(prompts[name], gold, strict=True)]
        found = [sample.get("bits_per_byte") for sample in samples if sample["dataset"] == name]
        assert found == [None if e is None else pytest.approx(e, abs=1e-4 if dtype == torch.float32 else 0.05) for e in expected]
        known = [f for f in found if f is not None]
        (score,) = (s for s in scores if (s["dataset"], s["metric"]) == (name, "bits_per_byte"))
        assert (score["items"], score["chance"]) == (len(known), None) and score["value"] == pytest.approx(sum(known) / len(known), abs=1e-4)


def test_bits_a_byte_are_lm_evals_own_likelihood(data_dir, tmp_path, in_bytes):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = in_bytes
    study = with_alpaca(study_on(data_dir, tmp_path, "xquad", "flores", max_new_tokens=2, max_translation_tokens=2))
    _, samples = tasks.evaluate(model, tokenizer, study, ("zh",))
    rows = {(t.dataset, t.lang, row["id"]): row for t in tasks.write_tasks(study, "zh") for row in t.rows}
    asked_for = [(row["prompt"], row["answers"][0]) for row in (rows[s["dataset"], s["lang"], s["id"]] for s in samples)]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in asked_for], disable_tqdm=True)
    expected = [-log_likelihood / math.log(2) / len(answer.encode()) for (log_likelihood, _), (_, answer) in zip(theirs, asked_for)]
    assert len(samples) == 3 + 12 and [s["bits_per_byte"] for s in samples] == pytest.approx(expected, abs=1e-4)


def test_bits_of_lm_evals_prompts_are_of_the_choice_as_it_is_scored(data_dir, tmp_path, in_bytes):
    """lm-eval asks XNLI without a prompt, by whole sentences; before every choice and answer it puts a space, which is scored and is no byte of them."""
    study = study_on(data_dir, tmp_path, "xnli", "xcopa", "xquad", prompt=("harness",), max_new_tokens=2)
    _, samples = tasks.evaluate(*in_bytes, study, ("zh",))
    found = {(s["dataset"], s["id"]): s["bits_per_byte"] for s in samples}
    for (dataset, key), answer in {("xnli", "0"): HARNESS["xnli"][1][1], ("xcopa", "0"): "下雨了。", ("xquad", "q0"): "猫"}.items():
        expected = bits(*in_bytes, HARNESS[dataset][0], " " + answer) * (len(answer.encode()) + 1) / len(answer.encode())
        assert found[dataset, key] == pytest.approx(expected, abs=1e-3)


def test_what_is_asked_for_bits_changes_no_other_score(tmp_path, small):
    study = load_study("smoke").model_copy(update={"runs": str(tmp_path)})
    without = study.model_copy(update={"evaluation": study.evaluation.model_copy(update={"benchmarks": ("xquad", "xcopa")})})
    more, fewer = tasks.evaluate(*small, study, ("zh", "en")), tasks.evaluate(*small, without, ("zh", "en"))
    for found, others in zip(more, fewer):
        assert [row for row in found if row["dataset"] != "instructions"] == others and len(found) > len(others)


def test_the_right_answer_is_scored_after_the_prompt_that_is_answered(data_dir, tmp_path, in_bytes, monkeypatch):
    """With the same examples in front of it, where there are examples."""
    prompts = {}
    run = tasks.simple_evaluate

    def listening(*arguments, **options):
        results = run(*arguments, **options)
        prompts.update({name: [s["arguments"][0][0] for s in sorted(samples, key=lambda s: s["doc_id"])] for name, samples in results["samples"].items()})
        return results

    monkeypatch.setattr(tasks, "simple_evaluate", listening)
    tasks.evaluate(*in_bytes, with_alpaca(study_on(data_dir, tmp_path, "xquad", max_new_tokens=2, num_fewshot=1)), ("zh",))
    assert prompts["xquad_zh"] == prompts["xquad_zh_gold"] and all(prompt.count("### Response:") == 2 for prompt in prompts["xquad_zh"])


# ---- held-out instructions
def test_held_out_instructions_are_scored_in_both_languages(tmp_path, in_bytes):
    study = with_data(load_study("smoke").model_copy(update={"runs": str(tmp_path)}), items=200, held_out=6)
    scores, samples = tasks.evaluate(*in_bytes, study.model_copy(update={"evaluation": EvalParams(benchmarks=("instructions",), num_fewshot=2)}), ("ar", "en"))
    assert [(s["dataset"], s["lang"], s["metric"], s["items"]) for s in scores] == [("instructions", lang, "bits_per_byte", 6) for lang in ("ar", "en")]
    items = World().instructions(6, "held_out")
    for lang, score in zip(("ar", "en"), scores):
        found = [s for s in samples if s["lang"] == lang]
        expected = [bits(*in_bytes, TEMPLATES["alpaca"].prompt(item[lang]["query"]), item[lang]["answer"]) for item in items]  # of training, without examples
        assert [s["value"] for s in found] == [s["bits_per_byte"] for s in found] == pytest.approx(expected, abs=1e-4)
        assert [s["cluster"] for s in found] == [item["relation"] for item in items] and score["value"] == pytest.approx(sum(expected) / 6, abs=1e-4)


def test_held_out_instructions_of_files_whatever_the_benchmarks_come_from(data_dir, tmp_path, in_bytes):
    """Their answers are scored as they stand, a space at the beginning included."""
    rows = {"en": [(f"What is {n} and {n}?", f" That is {2 * n}.") for n in range(20)], "vi": [(f"{n} cộng {n} bằng mấy?", f"Bằng {2 * n} đấy.") for n in range(20)]}
    for lang, texts in rows.items():
        (tmp_path / f"{lang}.json").write_text(text([{"instruction": i, "input": "", "output": o} for i, o in texts]), encoding="utf-8")
    study = study_on(data_dir, tmp_path, "instructions", prompt=("dsft", "harness"))
    data = DataParams(source="files", files={lang: str(tmp_path / f"{lang}.json") for lang in rows}, template="alpaca", held_out=4)
    study = study.model_copy(update={"data": data, "languages": ("vi",)})
    check_benchmarks(study.evaluation, ("vi", "en"))
    _, samples = tasks.evaluate(*in_bytes, study, ("vi", "en"))
    trained = set(load_parallel(data, "vi")["id"])
    asked_for = {lang: {s["id"]: s for s in samples if s["lang"] == lang} for lang in ("vi", "en")}
    assert asked_for["vi"].keys() == asked_for["en"].keys() == {str(n) for n in range(20)} - trained and len(trained) == 16
    for lang, found in asked_for.items():
        for key, sample in found.items():
            question, answer = rows[lang][int(key)]
            assert sample["value"] == sample["bits_per_byte"] == pytest.approx(bits(*in_bytes, TEMPLATES["alpaca"].prompt(question), answer), abs=1e-4)
            assert sample["cluster"] == key


def test_an_answer_longer_than_the_model_is_left_out_and_said(tmp_path, in_bytes, capsys):
    rows = {"en": [(f"Tell me {n}.", "ha " * (900 if n % 2 else 2)) for n in range(60)], "vi": [(f"Kể cho tôi {n}.", "hả " * (900 if n % 2 else 2)) for n in range(60)]}
    for lang, texts in rows.items():
        (tmp_path / f"{lang}.json").write_text(text([{"instruction": i, "output": o} for i, o in texts]), encoding="utf-8")
    data = DataParams(source="files", files={lang: str(tmp_path / f"{lang}.json") for lang in rows}, held_out=20, check_language=False)
    study = load_study("smoke").model_copy(update={"runs": str(tmp_path), "data": data, "languages": ("vi",), "evaluation": EvalParams(benchmarks=("instructions",))})
    (score, other), samples = tasks.evaluate(*in_bytes, study, ("vi", "en"))
    held_out = held_out_pairs(data, "vi")
    long = sum(int(pair.id) % 2 for pair in held_out)
    assert 0 < long < 20 and (score["items"], other["items"]) == (20 - long, 20 - long)
    asked_for = {sample["id"]: sample["value"] for sample in samples if sample["lang"] == "vi"}
    short = {pair.id: bits(*in_bytes, pair.target["instruction"] + "\n", pair.target["output"]) for pair in held_out if int(pair.id) % 2 == 0}
    assert asked_for == pytest.approx(short, abs=1e-3)
    (task,) = tasks.write_tasks(study, "vi")
    before = task.files["test"].stat().st_mtime_ns
    tasks._check_lengths(SimpleNamespace(tokenizer=True, tok_encode=list, max_length=100), [task])
    assert task.files["test"].stat().st_mtime_ns == before and len(task.rows) == 20  # other models, asked at the same time, read the same file
    assert f"instructions_vi: {long} of 20 answers are longer than the 2048 positions of the model and are left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"items": 64}}, "evaluation.benchmarks: instructions needs examples that no training uses; set data.held_out, such as 500"),
        ({"data": {"held_out": -1}}, "data.held_out = -1"),
        ({"evaluation": {"benchmarks": ["instructions"], "source": "hub", "prompt": ["harness"]}}, "are asked as in training; add dsft to `prompt`"),
        ({"evaluation": {"source": "hub", "splits": {"instructions": "dev"}}}, "evaluation.splits.instructions"),
    ],
)
def test_a_mistake_about_instructions_is_one_line(tmp_path, changes, said):
    study = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text(encoding="utf-8")) | changes
    (tmp_path / "mistaken.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    with pytest.raises(ParamsError) as error:
        load_study(tmp_path / "mistaken.yaml")
    assert said in str(error.value) and "\n" not in str(error.value)


# ---- clusters
def test_items_that_are_not_independent_share_a_cluster(data_dir, tmp_path, in_bytes):
    content = squad(QAS[:2])
    content["data"].append(squad([QAS[2]], context="小张没有猫。")["data"][0])
    (data_dir / PLACE["xquad"]).write_text(text(content), encoding="utf-8")
    (data_dir / PLACE["mmlu"]).write_text(text([*MMLU, MMLU[0] | {"id": "sums/dev/1"}]), encoding="utf-8")
    names = ("xquad", "xnli", "mmlu", "mkqa", "truthfulqa", "xcopa")
    _, samples = tasks.evaluate(*in_bytes, with_alpaca(study_on(data_dir, tmp_path, *names, max_new_tokens=2)), ("zh",))
    clusters = {name: [s["cluster"] for s in samples if s["dataset"] == name] for name in names}
    first, second, third = clusters["xquad"]
    assert first == second != third and len(set(clusters["xnli"])) == 1 and clusters["mmlu"] == ["sums", "sky", "sums"]
    for name in ("mkqa", "truthfulqa", "xcopa"):
        assert clusters[name] == [s["id"] for s in samples if s["dataset"] == name]


def test_sentences_of_one_article_share_a_cluster_where_the_hub_names_it(monkeypatch):
    urls = ["https://a", "https://a", "https://b"]
    read = lambda path, config, split: [{"text": t, "url": url} for t, url in zip(("One.", "Two.", "Three."), urls)]
    monkeypatch.setattr(benchmark_items, "load_dataset", lambda *place, split: datasets.Dataset.from_list(read(*place, split)))
    monkeypatch.setattr(benchmark_items, "_check_languages", lambda *_: None)
    items = load_items("flores", "zh-en", EvalParams(benchmarks=("flores",), source="hub"))
    assert [SOURCES["flores"].cluster(item) for item in items] == urls


# ---- translation
def test_translation_in_both_directions(data_dir, tmp_path, small, capsys):
    study = study_on(data_dir, tmp_path, "flores", max_translation_tokens=8)
    scores, samples = tasks.evaluate(*small, study, ("zh", "en"))
    assert [(s["lang"], s["metric"]) for s in scores] == [(d, m) for d in ("en-zh", "zh-en") for m in ("chrf", "spbleu", "comet", "bits_per_byte")]
    assert all(s["items"] == 6 for s in scores) and len(samples) == 12
    first = samples[0]
    assert first["source"] == "The museum opens at nine in the morning." and first["reference"] == "博物馆早上九点开门。"
    for direction in ("en-zh", "zh-en"):
        rows = [s for s in samples if s["lang"] == direction]
        expected = metrics.chrf([r["prediction"].strip() for r in rows], [r["reference"] for r in rows])
        assert next(s["value"] for s in scores if (s["lang"], s["metric"]) == (direction, "chrf")) == pytest.approx(expected, abs=1e-3)
    rows = tasks.write_tasks(study, "zh")[1].rows
    assert rows[0]["prompt"] == "把下面的中文句子翻译成英文。\n博物馆早上九点开门。\n" and rows[0]["lang"] == "zh-en"
    if os.environ["PATH"] and not any((Path(p) / "comet-score").exists() for p in os.environ["PATH"].split(os.pathsep)):
        assert "not available: COMET: no program comet-score on the path" in capsys.readouterr().out


def character_chrf(prediction: str, reference: str) -> float:
    """chrF++ of one pair from its definition: F2 of the mean precision and recall over n-grams, beta 2, spaces dropped in characters."""
    def grams(units, n):
        found = {}
        for k in range(len(units) - n + 1):
            found[tuple(units[k : k + n])] = found.get(tuple(units[k : k + n]), 0) + 1
        return found

    precisions, recalls = [], []
    for units, orders in ((lambda s: s.replace(" ", ""), range(1, 7)), (str.split, (1, 2))):
        for n in orders:
            a, b = grams(units(prediction), n), grams(units(reference), n)
            if a and b:
                common = sum(min(count, b.get(gram, 0)) for gram, count in a.items())
                precisions.append(common / sum(a.values()))
                recalls.append(common / sum(b.values()))
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 100 * 5 * p * r / (4 * p + r)


def test_chrf_is_the_published_definition():
    pair = ("the cat sat on the red mat today", "the cat sits on a red mat today")
    assert metrics.chrf([pair[0]], [pair[1]]) == pytest.approx(character_chrf(*pair), abs=1e-6)


def test_spbleu_with_its_subword_model_and_without(tmp_path, monkeypatch):
    spm = pytest.importorskip("sentencepiece")
    from sacrebleu.tokenizers import tokenizer_spm

    def nothing(*_, **__):
        raise OSError("no network here")

    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path))
    monkeypatch.setattr(tokenizer_spm, "download_file", nothing)
    with pytest.raises(metrics.NotAvailable, match=r"spBLEU: sacrebleu cannot load its subword model flores200 \(no network here\)"):
        metrics.spbleu(["猫"], ["猫"])
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(line for p in OURS.glob("*/*.*") for line in p.read_text(encoding="utf-8").splitlines()), encoding="utf-8")
    (tmp_path / "models").mkdir()
    spm.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "model"), vocab_size=400, character_coverage=1.0, hard_vocab_limit=False, minloglevel=2
    )
    (tmp_path / "model.model").rename(tmp_path / "models" / "flores200sacrebleuspm")
    sentences = ["博物馆早上九点开门。", "有两百人来听音乐会。"]
    assert metrics.spbleu(sentences, sentences) == pytest.approx(100)
    pieces = spm.SentencePieceProcessor(model_file=str(tmp_path / "models" / "flores200sacrebleuspm")).encode_as_pieces
    changed = ["博物馆早上九点关门。", "有两百人来听音乐会。"]
    assert metrics.spbleu(changed, sentences) == pytest.approx(bleu_by_hand([pieces(s) for s in changed], [pieces(s) for s in sentences]), abs=1e-6)


def bleu_by_hand(predictions: list[list[str]], references: list[list[str]]) -> float:
    """Corpus BLEU-4 from its definition, without smoothing."""
    logs = 0.0
    for n in range(1, 5):
        common = total = 0
        for prediction, reference in zip(predictions, references):
            have = [tuple(reference[k : k + n]) for k in range(len(reference) - n + 1)]
            for k in range(len(prediction) - n + 1):
                gram = tuple(prediction[k : k + n])
                total += 1
                if gram in have:
                    have.remove(gram)
                    common += 1
        logs += math.log(common / total) / 4
    have, want = sum(map(len, predictions)), sum(map(len, references))
    return 100 * math.exp(logs) * (1 if have >= want else math.exp(1 - want / have))


def test_comet_by_its_program(tmp_path, monkeypatch):
    program = tmp_path / "comet-score"
    program.write_text(
        "#!/bin/sh\n"  # stands in for unbabel-comet: one line a file, the options that the real one takes
        'while [ $# -gt 0 ]; do case $1 in -s) s=$2; shift;; -t) t=$2; shift;; -r) r=$2; shift;; --model) m=$2; shift;; '
        "--quiet|--only_system) ;; *) echo \"unknown $1\" >&2; exit 2;; esac; shift; done\n"
        '[ "$m" = none ] && { echo "no model none" >&2; exit 1; }\n'
        'echo "$t\tscore: 0.$(cat "$s" "$t" "$r" | wc -l)25"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert metrics.comet(["a\nb", "c"], ["d", "e"], ["f", "g"]) == pytest.approx(62.5)  # six lines: a line break within is none
    with pytest.raises(metrics.NotAvailable, match="comet-score failed with none: no model none"):
        metrics.comet(["a"], ["b"], ["c"], model="none")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(metrics.NotAvailable, match="pipx install unbabel-comet"):
        metrics.comet(["a"], ["b"], ["c"])


# ---- tokens
def test_with_a_tokenizer_that_begins_with_a_space_choices_have_the_tokens_of_training(data_dir, tmp_path, monkeypatch):
    from tokenizers import Tokenizer, models, normalizers

    from dsft.cached_lm import SharedContextLM

    template = TEMPLATES["alpaca"]
    (task,) = tasks.write_tasks(with_alpaca(study_on(data_dir, tmp_path, "xcopa")), "zh")
    letters = sorted({"▁", *(c for row in task.rows for c in row["prompt"] + "".join(row["choices"]))})
    made = Tokenizer(models.BPE({letter: n for n, letter in enumerate([*letters, "<s>"])}, []))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>", pad_token="<s>")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(letters) + 1, **size)).eval()
    pairs = []
    score = SharedContextLM._loglikelihood_tokens
    monkeypatch.setattr(SharedContextLM, "_loglikelihood_tokens", lambda self, requests, **options: pairs.extend(requests) or score(self, requests, **options))
    assert tasks.answer_delimiter(tokenizer, template) == " "
    tasks.evaluate(model, tokenizer, with_alpaca(study_on(data_dir, tmp_path, "xcopa")), ("zh",))
    assert len(pairs) == 4
    for (prompt, choice), context, continuation in pairs:
        assert choice.startswith(" ")
        assert context == tokenizer(prompt)["input_ids"]  # and so in dsft.data
        assert continuation == tokenizer(choice.strip(), add_special_tokens=False)["input_ids"]
