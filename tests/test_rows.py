"""What training rows hold besides their examples, and one model for several languages: the invariants of each system on the shipped base."""

import json
from itertools import product
from pathlib import Path

import pytest
from conftest import ROOT
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dsft.data import TokenizedExample, collate, example_fields, parallel_pairs, prompt_ids, tokenize
from dsft.files import ParamsError, digest
from dsft.methods import METHODS, Method, Stage
from dsft.microcosm import World
from dsft.rows import nearest_texts, plain_text, sampled
from dsft.settings import DataParams
from dsft.study import Study
from dsft.training import fine_tune, save_training, training_rows

MICRO = ROOT / "models" / "micro-llama"


def study(folder: Path, *methods, **changes) -> Study:
    given = dict(
        name="rows", models={"m": {"path": str(MICRO)}}, languages=["zh", "vi"], methods=methods, data={"items": 24}, runs=str(folder),
        train={"max_steps": 2, "batch_size": 4, "per_device_batch_size": 4, "learning_rate": 1e-3, "bf16": False, "logging_steps": 1},
    )  # fmt: skip
    return Study(**given | changes)


def rows(study: Study, method: str, lang: str = "zh", stage: int = 0) -> list[dict]:
    run = study.run("m", lang, method, 0)
    return training_rows(run, run.method.stages[stage])[0].to_list()


def test_plain_text_says_no_held_out_knowledge_and_no_english():
    world = World()
    for lang in ("zh", "vi", "ar"):
        held_out = {
            world.say(fact._replace(wording=wording), lang) for relation in world.knowledge for fact in world.known[relation, "test"] for wording in range(3)
        }
        documents = plain_text(DataParams(), lang, 1500)
        assert not [document for document in documents if document in held_out or any(document.startswith(fact) for fact in held_out)]
        assert not {item[lang] for item in world.sentences(200)} & set(documents)
    assert not [document for document in plain_text(DataParams(), "zh", 1500) if "?" in document or "？" in document]  # no questions


def test_an_empty_prompt_becomes_bos_or_eos():
    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    assert prompt_ids(tokenizer, [""]) == [[tokenizer.bos_token_id]]
    without = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "</s>": 1}, unk_token="a")), eos_token="</s>")
    assert prompt_ids(without, ["", "a"]) == [[1], [0]]


def test_rows_of_text_train(tmp_path):
    made = study(tmp_path, "tower")
    stage = rows(made, "tower")
    texts = [row for row in stage if row["id"].startswith("text")]
    assert (len(texts), len(stage)) == (16, 24)  # shares 0.66 and 0.33 of 24
    assert {row["x_tgt"] for row in stage} == {""} and all(" = " in row["y_tgt"] for row in stage if row not in texts)
    run = made.run("m", "zh", "tower", 0)
    trained = training_rows(run, run.method.stages[0])[0]
    ids = tokenize(trained, AutoTokenizer.from_pretrained(MICRO), 256)
    batch = collate([TokenizedExample(**row) for row in ids.select(range(3))], 0)
    assert batch["x_tgt"].shape == (3, 1)


def test_text_from_files(tmp_path):
    (tmp_path / "zh.jsonl").write_text("\n".join(json.dumps({"text": f"第{n}篇。\n完。"}, ensure_ascii=False) for n in range(5)), encoding="utf-8")
    (tmp_path / "zh.txt").write_text("一。\n\n二。\n", encoding="utf-8")
    files = {"en": "en.json", "zh": "zh.json"}
    read = lambda name, count: plain_text(DataParams(source="files", files=files, text={"zh": str(tmp_path / name)}), "zh", count)
    assert sorted(read("zh.jsonl", 9)) == [f"第{n}篇。\n完。" for n in range(5)]  # as many as there are, none twice
    assert sorted(read("zh.txt", 2)) == ["一。", "二。"]
    with pytest.raises(ParamsError, match=r"data.text.zh = .*no such file"):
        read("none.txt", 1)
    with pytest.raises(ValueError, match="data.text: none for zh, which the rows of alma need"):
        study(tmp_path, "alma", languages=["zh"], data={"source": "files", "files": files})


def test_restored_rows_are_the_query_where_nothing_is_switched(tmp_path):
    never = Method(name="never", stages=[{"rows": [{"instruction": "{switched}", "output": "{query_tgt}", "switch": 0.0}]}])
    for row in rows(study(tmp_path, never), "never"):
        assert row["x_tgt"].strip() == row["y_tgt"]
    switched = rows(study(tmp_path, "csr"), "csr")
    assert any(row["x_tgt"].strip() != row["y_tgt"] for row in switched)
    assert [row["x_tgt"] for row in rows(study(tmp_path, "csr", "tft"), "csr", stage=1)] == [row["x_tgt"] for row in rows(study(tmp_path, "csr", "tft"), "tft")]


def test_no_row_is_its_own_neighbour(tmp_path):
    texts = ["a", "b b", "b b", "b c"]
    assert all(n not in found and texts[n] not in [texts[other] for other in found] for n, found in enumerate(nearest_texts(texts, texts, 3)))
    made = study(tmp_path, "adaptive_mt", data={"items": 24, "held_out": 8})
    pairs, _ = parallel_pairs(made.data, "zh")
    said = {side: {pair_side["instruction"] for pair in pairs for pair_side in [getattr(pair, side)]} for side in ("english", "target")}
    near = [row for row in rows(made, "adaptive_mt") if row["x_tgt"].count("\n\n")]
    assert len(near) == 24
    for row in near:
        before, own = row["x_tgt"].split("\n\n")
        given, answer = before.split(" =\n")
        assert given != own.removesuffix(" =\n")
        assert any(given in said[side] and answer in said[other] for side, other in (("english", "target"), ("target", "english")))  # training rows only


def test_english_question_over_a_target_passage(tmp_path):
    made = study(tmp_path, "xp3")
    world = World()
    for item, row in zip(world.instructions(24), rows(made, "xp3")[24:], strict=True):
        question, passage = (item["en"]["question"], item["zh"]["passage"]) if item["zh"]["passage"] else ("", item["zh"]["query"])
        assert row["x_tgt"] == f"{question} Answer in Chinese.".strip() + f"\n{passage}\n"
        assert row["y_tgt"] == item["zh"]["answer"]


def test_bridge_has_no_target_question_with_its_target_answer(tmp_path):
    made = study(tmp_path, "bridge", "tft")
    asked = {(row["x_tgt"], row["y_tgt"]) for row in rows(made, "tft")}
    assert not asked & {(row["x_tgt"], row["y_tgt"]) for row in rows(made, "bridge")}


def test_a_quarter_of_the_rows_in_the_target_language(tmp_path):
    made = study(tmp_path, "share25", "tft")
    assert len(rows(made, "share25")) == len(rows(made, "tft")) == 24
    assert sum(row["x_tgt"] != row["x_en"] for row in rows(made, "share25")) == 6


def test_a_tag_names_the_language_of_the_answer(tmp_path):
    made = study(tmp_path, "tag")
    tags = [(row["x_tgt"].split(" ")[0], any("\u4e00" <= letter <= "\u9fff" for letter in row["y_tgt"])) for row in rows(made, "tag")]
    assert set(tags) == {("<2zh>", True), ("<2en>", False)}


@pytest.mark.parametrize(("temperature", "number"), product((1.0, 1.5, 4.0), (60, 61, 200)))
def test_languages_of_one_size_have_as_many_rows(temperature, number):
    counts = sampled(dict.fromkeys(("en", "zh", "vi"), number), temperature)
    assert sum(counts.values()) == 3 * number and max(counts.values()) - min(counts.values()) <= 1


def test_temperature_favours_small_languages():
    sizes = {"zh": 1000, "vi": 10}
    assert sampled(sizes, 1.0) == sizes
    shares = [sampled(sizes, temperature)["vi"] for temperature in (1.0, 1.5, 5.0)]
    assert shares == sorted(set(shares)) and shares[-1] < 505


def test_one_model_for_several_languages(tmp_path):
    made = study(tmp_path, "multi", "related", "tft")
    assert [(run.training_lang, run.method.name) for run in made.all_trainings()] == [("zh+vi", "multi"), ("vi", "related"), ("zh", "tft"), ("vi", "tft")]
    run = made.run("m", "zh", "multi", 0)
    trained, report = training_rows(run, run.method.stages[0])
    assert report["rows"] == {"en": 24, "zh": 24, "vi": 24} and len(set(trained["id"])) == 72
    assert rows(made, "multi", "vi") == trained.to_list()
    save_training(run, fine_tune(run), 0.0, "pytest")
    other = made.run("m", "vi", "multi", 0)
    other.check_trained()
    assert digest(other.trained) == digest(run.trained) and other.folder != run.folder


def test_a_related_language_is_trained_on_alone(tmp_path):
    made = study(tmp_path, "related", "tft")
    assert rows(made, "related", "zh") == rows(made, "tft", "vi")
    with pytest.raises(ValueError, match="languages: fr has no data"):
        study(tmp_path, Method(name="french", languages=["fr"]))
    with pytest.raises(ValueError, match="one model for all languages and starts from 'tft'"):
        study(tmp_path, Method(name="several", languages="all", start="tft"))
    study(tmp_path, Method(name="several", languages="all", start="sft"))


def test_one_stage_of_target_rows_is_tft(tmp_path):
    plain = Method(name="plain", stages=[Stage(rows=["tgt"])])
    made = study(tmp_path, plain, "tft")
    assert rows(made, "plain") == rows(made, "tft")


def test_every_method_has_rows(tmp_path):
    own = [name for name, method in METHODS.items() if method.stages and not method.recipes and not method.selects and not method.supervisions]
    made = study(tmp_path, *own)
    for name, lang in product(own, ("zh", "vi")):
        for number in range(len(METHODS[name].stages)):
            assert rows(made, name, lang, number)


def test_chains_end_in_the_reference(tmp_path):
    pairs, _ = parallel_pairs(study(tmp_path, "taco").data, "zh")
    for pair, row in zip(pairs, rows(study(tmp_path, "taco"), "taco"), strict=True):
        assert row["y_tgt"].rpartition("Response in Chinese: ")[2] == example_fields(pair, "zh")["o_tgt"]
