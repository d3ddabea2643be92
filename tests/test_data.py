"""Parallel instruction data: every source, the checks, the report; and training on real Alpaca with every method."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT, alpaca
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from dsft import data as dsft_data
from dsft.data import TokenizedExample, collate, held_out_pairs, load_parallel, parallel_pairs, parallel_rows, rows_digest, tokenize
from dsft.files import ParamsError, from_hub
from dsft.languages import check_language
from dsft.prompts import TEMPLATES
from dsft.study import DataParams, load_study

ENGLISH = [{"id": f"a-{n}", "instruction": f"What is {n} and {n}?", "input": "", "output": f"That is {2 * n}."} for n in range(20)]
VIETNAMESE = [{"id": f"a-{n}", "instruction": f"{n} cộng {n} bằng mấy?", "input": "", "output": f"Bằng {2 * n} đấy."} for n in range(20)]


def written(folder, name, rows):
    """Rows as a file of the format that the name says."""
    path = folder / name
    if name.endswith(".parquet"):
        Dataset.from_list(rows).to_parquet(path)
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return str(path)


def asked(folder, en=ENGLISH, vi=VIETNAMESE, kind="json", **changes):
    files = {"en": written(folder, f"en.{kind}", en), "vi": written(folder, f"vi.{kind}", vi)}
    return DataParams(**{"source": "files", "files": files, "template": "alpaca"} | changes)


# ---- sources
@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_the_same_rows_from_every_kind_of_file(tmp_path, kind):
    rows = load_parallel(asked(tmp_path, vi=VIETNAMESE[::-1], kind=kind), "vi")
    assert rows["y_en"][:] == [row["output"] for row in ENGLISH] and rows["y_tgt"][:] == [row["output"] for row in VIETNAMESE]
    assert rows[3]["x_tgt"] == TEMPLATES["alpaca"].prompt("3 cộng 3 bằng mấy?")


@pytest.mark.parametrize("lang", ["zh", "vi"])
def test_real_alpaca_is_parallel(lang):
    rows, report = parallel_rows(DataParams(source="files", files={"en": alpaca("en"), lang: alpaca(lang)}, template="alpaca"), lang)
    assert report["join"] == "id" and report["tables"][lang]["rows"] == 1500 and len(rows) == report["examples"] >= 1480
    assert report["rank correlation of question lengths"] > 0.8
    with open(alpaca("en"), encoding="utf-8") as file:
        english = {str(item["id"]): item for item in json.load(file)}
    assert all(row["y_en"] == english[row["id"]]["output"] for row in rows)
    assert sum("### Input:" in row["x_en"] for row in rows) == sum(bool(english[row["id"]]["input"]) for row in rows) > 500


def test_real_alpaca_by_position_and_what_a_shift_does(tmp_path):
    """x-LLM's files have no ids. One row missing in the middle is a length that does not fit, two files cut from other places are noticed too."""
    sides = {}
    for lang in ("en", "zh"):
        with open(alpaca(lang), encoding="utf-8") as file:
            sides[lang] = [{k: v for k, v in item.items() if k != "id"} for item in json.load(file)]
    whole = {lang: written(tmp_path, f"{lang}.json", rows) for lang, rows in sides.items()}
    assert parallel_rows(DataParams(source="files", files=whole), "zh")[1]["join"] == "position"
    cut = whole | {"zh": written(tmp_path, "cut.json", sides["zh"][:700] + sides["zh"][701:])}
    with pytest.raises(ParamsError, match="1499 and 1500 rows; joined by position they must have the same length"):
        load_parallel(DataParams(source="files", files=cut), "zh")
    shifted = {"en": written(tmp_path, "head.json", sides["en"][:-1]), "zh": written(tmp_path, "tail.json", sides["zh"][1:])}
    with pytest.raises(ParamsError, match="long questions do not have long translations"):
        load_parallel(DataParams(source="files", files=shifted), "zh")


@pytest.mark.parametrize("given_as, file", [("ar", "zh"), ("zh", "vi"), ("vi", "en"), ("fr", "en"), ("en", "vi"), ("en", "zh"), ("ru", "zh")])
def test_real_alpaca_in_another_language_is_refused(given_as, file):
    files = {"en": alpaca("en"), "vi": alpaca("vi")} | {given_as: alpaca(file)}
    with pytest.raises(ParamsError, match=rf"given as data.files.{given_as}, but"):
        load_parallel(DataParams(source="files", files=files), "vi" if given_as == "en" else given_as)


def test_a_hub_dataset_is_asked_for_as_the_study_says(monkeypatch, tmp_path):
    """The call that goes out, and the rows that come back: Bactrian-X by language, tatsu-lab/alpaca without ids."""
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((*args, kwargs))
        rows = [{k: v for k, v in row.items() if k != "id" or args[0] != "tatsu-lab/alpaca"} for row in (ENGLISH if "en" in args[1:] or args[1] is None else VIETNAMESE)]
        return Dataset.from_list(rows)

    monkeypatch.setattr("dsft.tables.load_dataset", load_dataset)
    bactrian = {lang: {"hub": "MBZUAI/Bactrian-X", "name": lang} for lang in ("en", "vi")}
    rows, report = parallel_rows(DataParams(source="files", files=bactrian), "vi")
    assert calls[0] == ("MBZUAI/Bactrian-X", "vi", {"split": "train", "revision": None}) and len(rows) == 20 and report["join"] == "id"
    mixed = {"en": {"hub": "tatsu-lab/alpaca", "revision": "main"}, "vi": {"hub": "x/vi", "name": "vi", "split": "all"}}
    rows, report = parallel_rows(DataParams(source="files", files=mixed), "vi")
    assert report["join"] == "position" and len(rows) == 20
    assert calls[2:] == [("x/vi", "vi", {"split": "all", "revision": None}), ("tatsu-lab/alpaca", None, {"split": "train", "revision": "main"})]


def test_taco_sets_bring_their_own_english(tmp_path):
    taco = [{**v, "output": f"Instruction in English: {e['instruction']} , \nResponse in English: {e['output']} , \nResponse in Vietnamese: {v['output']} "} for e, v in zip(ENGLISH, VIETNAMESE)]
    table = {"path": written(tmp_path, "taco.json", taco), "format": "taco"}
    rows = load_parallel(DataParams(source="files", files={"en": written(tmp_path, "other.json", ENGLISH[:3]), "vi": table}), "vi")
    assert rows["y_en"][:] == [row["output"] for row in ENGLISH] and rows["y_tgt"][:] == [row["output"] for row in VIETNAMESE]
    assert load_parallel(DataParams(source="files", files={"en": table}), "en")["y_tgt"][:] == [row["output"] for row in ENGLISH]


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("folder", ["data[1]", "a*b?", "{x}", "id=5", "with space"])
def test_a_path_is_a_path_and_no_pattern(tmp_path, folder, kind):
    (tmp_path / folder).mkdir()
    assert load_parallel(asked(tmp_path / folder, kind=kind), "vi")["y_tgt"][:] == [row["output"] for row in VIETNAMESE]


def test_values_of_several_types_in_a_field_are_read(tmp_path):
    """Nulls before text (datasets takes the type of a column from the first ten megabytes), ids as text and as numbers, fields that a few rows have."""
    mixed = [row | {"id": n if n % 2 else str(n), "input": None if n < 15 else "thêm", "note": [n] if n == 3 else "x"} for n, row in enumerate(VIETNAMESE)]
    rows = load_parallel(asked(tmp_path, en=[row | {"id": n} for n, row in enumerate(ENGLISH)], vi=mixed[:3] + [mixed[3] | {"more": 1}] + mixed[4:], kind="jsonl"), "vi")
    assert len(rows) == 20 and ["### Input:\nthêm" in row["x_tgt"] for row in rows] == [False] * 15 + [True] * 5


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    rows = load_parallel(asked(tmp_path), "vi")  # needs no cache
    monkeypatch.setattr(dsft_data, "LARGE", 10)
    with pytest.raises(ParamsError, match="file/cache cannot be written .*let HF_DATASETS_CACHE .* name a folder that can"):
        tokenize(rows, transformers.AutoTokenizer.from_pretrained(ROOT / "models" / "micro-llama"), 300)
    with pytest.raises(ParamsError, match="data.files.vi = 'x/y': the cache .* cannot be written"), from_hub("x/y", "dataset", "data.files.vi"):
        (tmp_path / "file" / "cache").mkdir(parents=True)


# ---- ids
@pytest.mark.parametrize("kind", ["json", "parquet"])
@pytest.mark.parametrize("gap", [None, float("nan")])
def test_ids_that_a_gap_made_fractions_are_the_same_ids(tmp_path, kind, gap):
    vietnamese = [row | {"id": gap if n == 5 else float(n)} for n, row in enumerate(VIETNAMESE)]
    files = {"en": written(tmp_path, "en.json", [row | {"id": n} for n, row in enumerate(ENGLISH)]), "vi": written(tmp_path, f"vi.{kind}", vietnamese)}
    rows, report = parallel_rows(DataParams(source="files", files=files, max_dropped=0.2), "vi")
    assert rows["id"][:] == [str(n) for n in range(20) if n != 5] and rows["y_tgt"][3] == VIETNAMESE[3]["output"]
    assert [d["reason"].split(": ")[1].split(" in ")[0] for d in report["dropped"]] == ["id is missing", "no partner"]


def test_no_id_at_all_is_no_id_however_it_is_written(tmp_path):
    _, report = parallel_rows(asked(tmp_path, en=[row | {"id": None} for row in ENGLISH], vi=[row | {"id": float("nan")} for row in VIETNAMESE]), "vi")
    assert report["join"] == "position" and report["examples"] == 20


# ---- lines
@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"])
def test_only_a_newline_ends_a_line_of_any_file(tmp_path, inside):
    from dsft import benchmark_items
    from dsft.code_switching import read_dictionary
    from dsft.files import read_lines
    from dsft.recipes.sdrrl import _aligned_sentences, _read_translations

    text = f"ice{inside}cream"
    for end in ("\n", "\r\n"):
        file, other = tmp_path / "file", tmp_path / "other"
        file.write_bytes(f"{text}{end}two{end}".encode())
        other.write_bytes(f"kem{end}hai{inside}đó{end}".encode())
        assert read_lines(file) == [text, "two"]
        assert _aligned_sentences((str(file), str(other)), "vi") == [(text, "kem"), ("two", f"hai{inside}đó")]
        file.write_bytes(f"{text}\tkem{end}two\thai{end}".encode())
        assert read_dictionary(str(file), "") == {text: "kem", "two": "hai"}
        file.write_bytes((json.dumps({"en": "Yes.", "translation": text}, ensure_ascii=inside == "\r" or inside < " ") + end).encode())
        assert _read_translations(str(file), "vi") == {"Yes.": text}
        assert benchmark_items.read_lines(f"{text}{end}two{end}") == [{"text": text}, {"text": "two"}]
        assert benchmark_items.read_tsv(f"{text}\t1{end}two\t2{end}", ("a", "b")) == [{"a": text, "b": "1"}, {"a": "two", "b": "2"}]
        assert benchmark_items.read_json(json.dumps({"a": text}) + end + json.dumps({"a": 2})) == [{"a": text}, {"a": 2}]
    vietnamese = [row | {"output": f"{row['output']}{inside}!"} for row in VIETNAMESE]
    assert load_parallel(asked(tmp_path, vi=vietnamese, kind="jsonl"), "vi")["y_tgt"][:] == [row["output"] for row in vietnamese]


def test_any_language_code_is_taken_and_an_unknown_script_said(tmp_path):
    rows, report = parallel_rows(asked(tmp_path, files={"en": written(tmp_path, "e.json", ENGLISH), "qaa-Test": written(tmp_path, "q.json", VIETNAMESE)}), "qaa-Test")
    assert len(rows) == 20 and report["tables"]["qaa-Test"]["language"].startswith("not checked")
    assert not check_language(["Wo steht das Haus? Das Haus steht am Fluss."] * 20, "de_AT")[1]


def test_the_microcosm_draws_its_examples_by_seed_alone():
    study = load_study("micro")
    first, again = (rows_digest(load_parallel(study.data, "zh", 0)) for _ in range(2))
    assert first == again != rows_digest(load_parallel(study.data, "zh", 1))


# ---- what is dropped
def test_the_report_counts_every_dropped_row_once(tmp_path):
    vietnamese = [dict(row) for row in VIETNAMESE]
    vietnamese[2]["output"] = ""
    vietnamese[5]["instruction"] = None
    vietnamese[7]["output"] = "Bằng mười bốn đấy, " * 200
    vietnamese[9]["id"] = "a-8"
    data = asked(tmp_path, vi=vietnamese, max_dropped=0.5)
    rows, report = parallel_rows(data, "vi")
    told = {d["reason"].split(": ")[1]: (d["count"], [e["row"] for e in d["examples"]]) for d in report["dropped"]}
    assert told["output is empty"] == (1, [3]) and told["instruction is missing"] == (1, [6]) and told["id stands twice"] == (2, [9, 10])
    assert told["answer much longer than the English one"] == (1, [8])
    assert len(rows) == 20 - 5 and {row["id"] for row in rows}.isdisjoint({"a-2", "a-5", "a-7", "a-8", "a-9"})


def test_an_example_that_repeats_another_is_dropped(tmp_path):
    twice = lambda rows: rows + [rows[0] | {"id": "again"}]
    rows, report = parallel_rows(asked(tmp_path, en=twice(ENGLISH), vi=twice(VIETNAMESE), max_dropped=0.1), "vi")
    assert len(rows) == 20 and "the example stands there twice" in report["dropped"][0]["reason"]


@settings(max_examples=25, deadline=None)
@given(broken=st.sets(st.integers(0, 19)), limit=st.floats(0, 1))
def test_the_run_stops_above_the_set_share(tmp_path_factory, broken, limit):
    folder = tmp_path_factory.mktemp("share")
    data = asked(folder, vi=[row | {"output": ""} if n in broken else row for n, row in enumerate(VIETNAMESE)], max_dropped=limit, check_language=False)
    if len(broken) > limit * 20:
        with pytest.raises(ParamsError, match=f"{len(broken)} of 20 rows unusable"):
            load_parallel(data, "vi")
    elif len(broken) == 20:
        with pytest.raises(ParamsError, match="20 of 20 rows unusable and no example is left"):
            load_parallel(data, "vi")
    else:
        assert len(load_parallel(data, "vi")) == 20 - len(broken)


@pytest.mark.parametrize("blank", ["", " \n", "\t", "\u00a0", "\u3000", "\u200b", "\ufeff", "\u2028", "\u2060 \u00ad", None])
def test_a_blank_input_is_no_input(tmp_path, blank):
    rows = load_parallel(asked(tmp_path, vi=[row | {"input": blank} for row in VIETNAMESE]), "vi")
    assert rows["x_tgt"][:] == [TEMPLATES["alpaca"].prompt(row["instruction"]) for row in VIETNAMESE]
    assert not any("### Input:" in row["x_tgt"] + row["x_en"] for row in rows)
    assert TEMPLATES["plain"].prompt("Đi.", blank or "") == "Đi.\n"


def test_what_is_left_over_in_a_table_is_counted(tmp_path):
    vietnamese = [row | {"input": "<noinput>" if n < 4 else "", "output": row["output"] + (" &quot;đó&#39; AT&T; &nope;" if n > 16 else "")} for n, row in enumerate(VIETNAMESE)]
    vietnamese[0]["output"] = "<nooutput> đấy"
    rows, report = parallel_rows(asked(tmp_path, vi=vietnamese), "vi")
    assert len(rows) == 20 and report["tables"]["en"]["notes"] == []
    assert report["tables"]["vi"]["notes"] == ["4 of 20 rows hold a placeholder for no text, such as <noinput>", "3 of 20 rows hold an entity of HTML, such as &quot;"]


def test_no_row_to_train_on_is_one_line(tokenizer):
    with pytest.raises(ParamsError, match="no row to train on"):
        tokenize(Dataset.from_list([]), tokenizer, 99)


# ---- what is held out
def said(pairs, side):
    return {(getattr(pair, side)["instruction"], getattr(pair, side)["output"]) for pair in pairs}


def test_nothing_is_held_out_unless_it_is_asked_for(tmp_path):
    """The rows, and the report of them, are those of before there was anything to hold out."""
    data = asked(tmp_path)
    rows, report = parallel_rows(data, "vi")
    assert rows.to_list() == [
        {"id": v["id"], **{f"{k}_{s}": text for s, r in (("tgt", v), ("en", e)) for k, text in (("x", TEMPLATES["alpaca"].prompt(r["instruction"])), ("y", r["output"]))}}
        for v, e in zip(VIETNAMESE, ENGLISH)
    ]
    assert report.keys() == {"source", "lang", "tables", "join", "rank correlation of question lengths", "examples", "dropped"}
    assert held_out_pairs(data, "vi") == []
    assert rows_digest(load_parallel(DataParams(items=20), "zh")).startswith("47dd73e6482de698")


@pytest.mark.parametrize("change", ["none", "reversed", "no ids", "a row less in Vietnamese", "an empty answer in Vietnamese", "a row more in English", "fewer items"])
def test_held_out_examples_are_in_no_training_whatever_its_language(tmp_path, change):
    english, vietnamese, changes = ENGLISH, VIETNAMESE, {}
    if change == "reversed":
        english, vietnamese = ENGLISH[::-1], VIETNAMESE[3:] + VIETNAMESE[:3]
    elif change == "no ids":  # joined by position with the Vietnamese, while English alone still has its ids
        vietnamese = [{k: v for k, v in row.items() if k != "id"} for row in VIETNAMESE]
    elif change == "a row less in Vietnamese":
        vietnamese = VIETNAMESE[1:]
    elif change == "an empty answer in Vietnamese":
        vietnamese = [row | {"output": ""} if n == 3 else row for n, row in enumerate(VIETNAMESE)]
    elif change == "a row more in English":
        english = [*ENGLISH, {"id": "more", "instruction": "Sing.", "input": "", "output": "La la."}]
    elif change == "fewer items":
        changes = {"items": 5}
    data = asked(tmp_path, en=english, vi=vietnamese, held_out=6, max_dropped=0.5, **changes)
    held_out, in_english = held_out_pairs(data, "vi"), held_out_pairs(data, "en")
    training, (sft, report) = parallel_pairs(data, "vi")[0], parallel_pairs(data, "en")
    assert len(in_english) == 6 == report["held out"] and said(held_out, "english") <= said(in_english, "english")
    assert len(held_out) >= 5 and (change != "none" or len(held_out) == 6)
    assert said(training, "english").isdisjoint(said(in_english, "english")) and said(sft, "english").isdisjoint(said(in_english, "english"))
    assert said(training, "target").isdisjoint(said(held_out, "target"))
    if not changes:
        assert len(training) + len(held_out) == len(load_parallel(data.model_copy(update={"held_out": 0}), "vi"))
    else:
        assert len(training) == len(sft) == 5
    assert [pair.id for pair in held_out_pairs(data, "vi")] == [pair.id for pair in held_out]


def test_a_larger_number_holds_out_what_a_smaller_one_does(tmp_path):
    few, many = (said(held_out_pairs(asked(tmp_path, held_out=n), "vi"), "english") for n in (4, 9))
    assert len(few) == 4 and len(many) == 9 and few < many


def test_what_reads_like_a_held_out_answer_in_the_target_language_is_not_trained_on(tmp_path):
    """Two English questions that have one translation."""
    first = held_out_pairs(asked(tmp_path, held_out=1), "vi")[0]
    twin = next(n for n, row in enumerate(ENGLISH) if row["id"] != first.id)
    vietnamese = [row | {k: first.target[k] for k in ("instruction", "output")} if n == twin else row for n, row in enumerate(VIETNAMESE)]
    pairs, _ = parallel_pairs(asked(tmp_path, vi=vietnamese, held_out=1), "vi")
    assert {pair.id for pair in pairs} == {row["id"] for row in ENGLISH} - {first.id, ENGLISH[twin]["id"]}


@pytest.mark.parametrize(("held_out", "why"), [(20, "all 20 examples that can be used in 'vi' are held out; lower it"), (500, "all 20 examples")])
def test_no_example_to_train_on_is_one_line(tmp_path, held_out, why):
    with pytest.raises(ParamsError, match=f"data.held_out = {held_out}: {why}"):
        load_parallel(asked(tmp_path, held_out=held_out), "vi")


@pytest.mark.parametrize("lang", ["en", "zh", "ar"])
def test_the_microcosm_holds_out_the_same_for_every_seed(lang):
    data = DataParams(items=300, held_out=40)
    held_out = held_out_pairs(data, lang)
    assert len(held_out) == 40 and [pair.id for pair in held_out] == [pair.id for pair in held_out_pairs(data, "vi")]
    for seed in (0, 1, 1000):
        pairs, report = parallel_pairs(data, lang, seed)
        assert len(pairs) == 300 and report["held out"] == 40
        assert said(pairs, "target").isdisjoint(said(held_out, "target")) and said(pairs, "english").isdisjoint(said(held_out, "english"))


def test_real_alpaca_with_examples_held_out():
    files = {name: alpaca(name) for name in ("en", "zh", "vi")}
    data = DataParams(source="files", files=files, template="alpaca", held_out=100)
    in_english = said(held_out_pairs(data, "en"), "english")
    for lang in ("zh", "vi"):
        held_out, (pairs, report) = held_out_pairs(data, lang), parallel_pairs(data, lang)
        assert 95 <= len(held_out) <= 100 == len(in_english) and report["held out"] == len(held_out)
        assert said(held_out, "english") <= in_english and said(pairs, "english").isdisjoint(in_english)


# ---- tokens
@pytest.fixture(scope="module")
def tokenizer():
    """Bytes with BOS and EOS, and no pad token, as LLaMA's."""
    vocab = {"<s>": 0, "</s>": 1} | {b: n + 2 for n, b in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(texts, texts, texts, texts), min_size=1, max_size=6), max_length=st.integers(8, 90))
def test_no_example_is_without_a_label_and_only_whole_answers_end(tokenizer, rows, max_length):
    rows = Dataset.from_list([dict(zip(("x_tgt", "y_tgt", "x_en", "y_en"), row)) | {"id": str(n)} for n, row in enumerate(rows)])
    size = lambda text: len(text.encode())
    fitting = [row for row in rows if all(1 + size(row[f"x_{s}"]) < max_length for s in ("tgt", "en"))]
    report = {}
    if not fitting:
        with pytest.raises(ParamsError, match="every prompt is longer"):
            tokenize(rows, tokenizer, max_length)
        return
    out = tokenize(rows, tokenizer, max_length, report=report)
    assert len(out) == len(fitting) == report["tokens"]["examples"]
    assert report["tokens"]["dropped, prompt too long"] == len(rows) - len(fitting)
    for side in ("tgt", "en"):
        whole = [1 + size(row[f"x_{side}"]) + size(row[f"y_{side}"]) + 1 <= max_length for row in fitting]
        assert report["tokens"]["answers cut"][side] == whole.count(False)
        for example, fits, row in zip(out, whole, fitting, strict=True):
            x, y = example[f"x_{side}"], example[f"y_{side}"]
            assert y and len(x) + len(y) <= max_length and (y[-1] == 1) == fits
            if fits:
                assert tokenizer.decode(x + y, skip_special_tokens=True) == row[f"x_{side}"] + row[f"y_{side}"]


def test_one_worker_or_several_and_the_cache_give_the_same(tokenizer, monkeypatch):
    rows = load_parallel(DataParams(items=300), "ar")
    alone = tokenize(rows, tokenizer, 300).to_list()
    assert tokenize(rows, tokenizer, 300, workers=3).to_list() == alone
    monkeypatch.setattr(dsft_data, "LARGE", 100)
    _, file = dsft_data._cache(rows, tokenizer, 300)
    first = tokenize(rows, tokenizer, 300, workers=2)
    kept = {f: f.stat().st_mtime_ns for f in file.parent.glob(f"{file.stem}*")}
    assert first.to_list() == alone and kept
    assert tokenize(rows, tokenizer, 300, workers=2).to_list() == alone
    assert {f: f.stat().st_mtime_ns for f in file.parent.glob(f"{file.stem}*")} == kept, "tokenised again"
    assert len(tokenize(rows, tokenizer, 250)) <= 300 and dsft_data._cache(rows, tokenizer, 250)[1] != file


def test_loss_is_on_the_response_only_and_a_tokenizer_without_pad_token_trains(tokenizer):
    """The gradient of TFT with respect to the logits at the prompt's positions is zero, by the trainer's own loss."""
    from dsft.losses import dsft_loss

    rows = load_parallel(DataParams(items=3), "vi")
    assert tokenizer.pad_token_id is None
    batch = collate([TokenizedExample(**row) for row in tokenize(rows, tokenizer, 300)], 0)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2))
    loss = dsft_loss(model, batch, (), "naive")["tft"]
    by_hand = []
    for x, x_mask, y, y_mask in zip(batch["x_tgt"], batch["x_tgt_mask"], batch["y_tgt"], batch["y_tgt_mask"]):
        ids = torch.cat([x[x_mask], y[y_mask]])
        nll = -model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        by_hand.append(nll[int(x_mask.sum()) - 1 :])
    assert loss.item() == pytest.approx(torch.cat(by_hand).mean().item(), rel=1e-5)
    assert batch["y_tgt"][0][batch["y_tgt_mask"][0]][-1] == tokenizer.eos_token_id, "EOS is a label"


# ---- training
@pytest.mark.parametrize("method, lang", [("sft", "zh"), *((m, lang) for m in ("tft", "sdrrl", "dsft_logits", "dsft_feature") for lang in ("zh", "vi"))])
def test_every_method_trains_on_real_alpaca(train_on_alpaca, method, lang):
    run, trainer = train_on_alpaca(lang, method)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.state.global_step == 20 and all(math.isfinite(entry["loss"]) for entry in logs)
    assert logs[-1]["loss_tft"] < logs[0]["loss_tft"]
    assert (logs[-1]["loss_lc"] > 0) == (logs[-1]["loss_et"] > 0) == method.startswith("dsft")
    report = json.loads((run.training_folder / "data_report.json").read_text(encoding="utf-8"))
    assert report["tokens"]["examples"] > 0.7 * (96 if method != "sdrrl" else 400)
    assert transformers.AutoModelForCausalLM.from_pretrained(run.trained).num_parameters() == trainer.model.num_parameters()
    if method == "sdrrl":
        assert set(report["tasks"]) == {"question", "translation", "completion"}


# ---- the hub
def raised(name: str) -> Exception:
    """An error as the library raises it, inside one of transformers' as it arrives here."""
    import httpx
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import errors

    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/x"))
    inner = {
        "gated": lambda: errors.GatedRepoError("Cannot access gated repo", response=response),
        "unknown": lambda: errors.RepositoryNotFoundError("404 Client Error", response=response),
        "unknown data": lambda: DatasetNotFoundError("Dataset 'x/y' doesn't exist on the Hub or cannot be accessed."),
        "offline": lambda: errors.OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled."),
        "no connection": lambda: httpx.ConnectError("[Errno -2] Name or service not known"),
        "not cached": lambda: errors.LocalEntryNotFoundError("Cannot find the requested files in the disk cache"),
        "no such configuration": lambda: ValueError("BuilderConfig 'xx' not found.\nAvailable: ['af', 'ar']"),
    }[name]()
    outer = OSError("Could not load it.\nCheck your internet connection or see the documentation.")
    outer.__cause__ = inner
    return outer if name != "no such configuration" else inner


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gated", "is gated: accept its terms at https://huggingface.co/x/y, then `hf auth login`"),
        ("unknown", "no such model on the hub, and no such folder; correct the name"),
        ("unknown data", "no such model on the hub"),
        ("offline", "the hub cannot be reached: go online (is HF_HUB_OFFLINE set?), or run `hf download x/y`"),
        ("no connection", "the hub cannot be reached"),
        ("not cached", "the hub cannot be reached"),
        ("no such configuration", "BuilderConfig 'xx' not found. Available: ['af', 'ar']"),
    ],
)
def test_what_the_hub_refuses_is_one_line(name, said):
    with pytest.raises(ParamsError) as error, from_hub("x/y", "model", "models.m.path"):
        raise raised(name)
    assert str(error.value).startswith("models.m.path = 'x/y': ") and said in str(error.value) and "\n" not in str(error.value)


def test_a_missing_connection_is_one_line_from_the_libraries_themselves(monkeypatch):
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    files = {lang: {"hub": "MBZUAI/Bactrian-X", "name": lang} for lang in ("en", "vi")}
    with pytest.raises(ParamsError, match=r"data.files.vi = 'MBZUAI/Bactrian-X': the hub cannot be reached: .*hf download MBZUAI/Bactrian-X --repo-type dataset"):
        load_parallel(DataParams(source="files", files=files), "vi")
    with pytest.raises(ParamsError, match="the hub cannot be reached"), from_hub("no-such/model-here"):
        transformers.AutoTokenizer.from_pretrained("no-such/model-here")


# ---- plans
@pytest.mark.parametrize("study", ["llama2-7b", "gemma2-2b", "smollm2-135m"])
def test_a_plan_lists_the_whole_graph_without_the_network(study, tmp_path):
    """With every socket refused, in this process's children too, the graph of a hub study is listed."""
    (tmp_path / "sitecustomize.py").write_text(
        "import socket\n"
        "def refuse(self, address, *rest):\n"
        "    if self.family != socket.AF_UNIX: raise AssertionError(f'the network was asked for {address}')\n"
        "socket.socket.connect = socket.socket.connect_ex = refuse\n"
        "socket.getaddrinfo = lambda host, *rest, **more: refuse(socket.socket(), host)\n"
    )
    command = f"dsft_check {study} --plan && snakemake --config study={study} --nolock --cores 2 --dry-run --quiet host"
    folder = os.path.dirname(sys.executable)
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {"PYTHONPATH": str(tmp_path), "PATH": f"{folder}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 0 and "the network was asked for" not in result.stdout, result.stdout[-3000:]
    spec = load_study(study)
    counts = {words[0]: int(words[1]) for line in result.stdout.splitlines() if len(words := line.split()) == 2 and words[1].isdigit()}
    assert counts["evaluate"] == len(spec.all_runs()) and counts["select_layers"] == len(spec.languages)
    assert counts["train"] == len(spec.all_trainings())
    assert counts["recipe_rows"] == len(spec.languages) * len(spec.seeds)
