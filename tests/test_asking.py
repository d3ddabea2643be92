"""How methods have their models asked: English words, tags, examples, thoughts; scored as everyone's answers."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from lm_eval.api.model import LM
from transformers import AutoModelForCausalLM, AutoTokenizer

import dsft.tasks as tasks
from dsft.asking import after_thoughts, examples_before, split_thought, thinks
from dsft.benchmark_items import BENCHMARK_SEED
from dsft.data import example_fields, say
from dsft.methods import METHODS, PATTERNS, Ask
from dsft.microcosm import World
from dsft.prompts import TEMPLATES
from dsft.results import Score
from dsft.study import Study
from dsft.tables import Pair

MICRO = ROOT / "models" / "micro-llama"
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def study(folder: Path, *benchmarks, **changes) -> Study:
    given = dict(
        name="asking", models={"m": {"path": str(MICRO)}}, languages=["zh", "vi"], methods=["base", "xp3", "tag", "taco", "ldp", "adaptive_mt"],
        data={"items": 40}, evaluation={"items": 6, "benchmarks": benchmarks}, runs=str(folder),
    )  # fmt: skip
    return Study(**given | changes)


def asked(study: Study, method: str, lang: str = "zh") -> dict[str, list[dict]]:
    return {f"{task.dataset} {task.lang}": task.rows for task in tasks.write_tasks(study, lang, ask=METHODS[method].ask)}


def test_default_is_asked_as_before(tmp_path):
    made = study(tmp_path, "xquad", "xcopa", "flores")
    assert METHODS["tft"].ask == Ask() and made.asked_folder("zh") == made.asked_folder("zh", Ask())
    items = World().benchmark("xquad", 6, BENCHMARK_SEED)
    assert [row["prompt"] for row in asked(made, "tft")["xquad zh"]] == [item["zh"]["query"] + "\n" for item in items]
    assert set(asked(made, "tft")["xquad zh"][0]) == {"id", "cluster", "relation", "seen", "lang", "asked", "prompt", "answers"}


def test_each_way_of_asking_has_a_folder(tmp_path):
    made = study(tmp_path, "xquad")
    folders = {tasks.write_tasks(made, "zh", ask=METHODS[name].ask)[0].folder for name in ("tft", "xp3", "tag", "ldp")}
    assert len(folders) == 4


def test_english_words_around_target_content(tmp_path):
    made = study(tmp_path, "xquad", "mkqa")
    xquad, mkqa = asked(made, "xp3").values()
    for item, row in zip(World().benchmark("xquad", 6, BENCHMARK_SEED), xquad, strict=True):
        assert row["prompt"] == f"{item['en']['question']} Answer in Chinese.\n{item['zh']['passage']}\n" and row["answers"] == item["zh"]["answers"]
    for item, row in zip(World().benchmark("mkqa", 6, BENCHMARK_SEED), mkqa, strict=True):
        assert row["prompt"] == f"Answer in Chinese.\n{item['zh']['query']}\n"
    assert asked(made, "xp3", "en") == asked(made, "tft", "en")


def test_words_of_real_benchmarks():
    item = {"premise": "街上很湿。", "hypothesis": "下雨了。", "label": 0}
    row = tasks.to_prompt("xnli", "zh", item, TEMPLATES["alpaca"], "en")
    assert "Does the hypothesis follow" in row["prompt"] and "街上很湿。" in row["prompt"] and row["choices"] == ["Yes", "Maybe", "No"]
    row = tasks.to_prompt("mkqa", "zh", {"question": "谁？", "answers": ["我"]}, TEMPLATES["alpaca"], "en")
    assert "with the answer only. Answer in Chinese." in row["prompt"]
    for name, item in (("xnli", item), ("mkqa", {"question": "谁？", "answers": ["我"]})):
        assert tasks.to_prompt(name, "zh", item, TEMPLATES["alpaca"], "tgt") == tasks.to_prompt(name, "zh", item, TEMPLATES["alpaca"])


def test_prompts_differ_by_their_tag_only(tmp_path):
    made = study(tmp_path, "xquad", "flores")
    plain, tagged = asked(made, "tft"), asked(made, "tag")
    for name, tag in (("xquad zh", "<2zh> "), ("flores en-zh", "<2zh> "), ("flores zh-en", "<2en> ")):
        assert [row["prompt"] for row in tagged[name]] == [tag + row["prompt"] for row in plain[name]]
    assert asked(made, "tag", "en")["xquad en"][0]["prompt"].startswith("<2en> ")


def test_examples_in_other_languages_hold_no_gold_answer(tmp_path):
    made = study(tmp_path, "xquad", "mkqa", "xcopa", "truthfulqa")
    plain = asked(made, "tft")
    for name, rows in asked(made, "ldp").items():
        for row, other in zip(rows, plain[name], strict=True):
            before = row["prompt"].removesuffix(other["prompt"])
            gold = row["answers"] if "answers" in row else [row["choices"][row["label"]]]
            assert before.count("\n\n") == 4 and not CHINESE.search(before) and not [answer for answer in gold if answer in before]
    for row, other in zip(asked(made, "ldp", "en")["xquad en"], asked(made, "tft", "en")["xquad en"], strict=True):
        assert CHINESE.search(row["prompt"].removesuffix(other["prompt"]))


def test_nearest_examples_are_training_rows(tmp_path):
    made = study(tmp_path, "flores")
    world = World()
    said = {item[lang]["query"] for item in world.instructions(40) for lang in ("en", "zh")}
    for name, rows in asked(made, "adaptive_mt").items():
        for row, plain in zip(rows, asked(made, "tft")[name], strict=True):
            before = row["prompt"].removesuffix(plain["prompt"])
            assert before.count("\n\n") == 1 and before.strip().split("\n")[-1] in said
            assert row["answers"][0] not in before
    one, other = examples_before(made, "flores", "en-zh", METHODS["adaptive_mt"].ask.shots, ["What colour is the car of Nora?", "Who is afraid of dogs?"])
    assert one != other


def test_answers_stand_behind_the_last_marker():
    assert split_thought("a M: b M: c\n", "M:") == ("a M: b M:", "c", True)
    assert split_thought("a", "M:") == ("a\nM:", "", False)
    assert split_thought("", "M:") == ("M:", "", False)
    assert [thinks(METHODS["taco"].ask, lang) for lang in ("zh", "en", "zh-en", "en-zh")] == [True, False, False, True]


class Continues(LM):
    """Continues one of some texts, and finds likeliest what it would say; notes its prompts."""

    def __init__(self, texts: list[str]):
        super().__init__()
        self.texts, self.asked = texts, []

    def _rest(self, prompt: str) -> str:
        self.asked.append(prompt)
        return next((text.removeprefix(prompt) for text in self.texts if text.startswith(prompt)), "")

    def generate_until(self, requests, disable_tqdm=False):
        cut = lambda text, stops: min((text.split(stop)[0] for stop in stops), key=len, default=text)
        return [cut(self._rest(prompt), told["until"]) for prompt, told in (request.args for request in requests)]

    def loglikelihood(self, requests, disable_tqdm=False):
        return [(0.0 if self._rest(prompt) == choice else -50.0, False) for prompt, choice in (request.args for request in requests)]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError


def chains(name: str, count: int) -> list[str]:
    """The prompts of a benchmark with the chain and answer that TaCo's rows would teach."""
    texts = []
    for item in World().benchmark(name, count, BENCHMARK_SEED):
        answers = {lang: item[lang]["answers"][0] if "answers" in item[lang] else item[lang]["choices"][item[lang]["label"]] for lang in ("en", "zh")}
        pair = Pair("0", *({"instruction": item[lang]["query"], "input": "", "output": answers[lang]} for lang in ("zh", "en")))
        texts.append("".join(say(PATTERNS["taco"][0], example_fields(pair, "zh"), TEMPLATES["plain"])))
    return texts


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """A function: texts that a model continues -> the scores, by dataset and metric, the samples, and the model."""

    def scored(texts: list[str]):
        lm = Continues(texts)
        monkeypatch.setattr(tasks, "_by_name", lambda *_: lm)
        monkeypatch.setattr(tasks, "_compare_ids", lambda *_: None)
        made = study(tmp_path, "xquad", "mkqa", "xcopa")
        scores, samples = tasks.evaluate("anything", AutoTokenizer.from_pretrained(MICRO), made, ("zh",), METHODS["taco"].ask)
        return {(score["dataset"], score["metric"]): score for score in scores}, samples, lm

    return scored


def test_gold_chains_score_as_the_references(scored):
    scores, samples, lm = scored([text for name in ("xquad", "mkqa", "xcopa") for text in chains(name, 6)])
    assert {scores[key]["value"] for key in (("xquad", "f1"), ("mkqa", "f1"), ("xcopa", "acc"))} == {100.0}
    assert {score["unparsed"] for score in scores.values()} == {0} and {sample["unparsed"] for sample in samples} == {False}
    assert [sample["prediction"].strip() for sample in samples] == [sample["reference"] for sample in samples]
    assert all(sample["thought"].endswith("Response in Chinese:") and "Response in English:" in sample["thought"] for sample in samples)


def test_what_is_not_parsed_is_counted_and_asked(scored):
    texts = chains("xquad", 6)
    scores, samples, lm = scored([texts[0], *(text.split("\n")[0] + "\nno idea" for text in texts[1:])])
    assert scores["xquad", "f1"]["unparsed"] == 5
    assert Score(**scores["xquad", "f1"]).unparsed == 5
    assert [sample["unparsed"] for sample in samples if sample["dataset"] == "xquad"] == [False, *[True] * 5]
    assert sum(prompt.endswith("no idea\nResponse in Chinese:") for prompt in set(lm.asked)) == 5


def test_a_real_model_thinks(tmp_path):
    made = study(tmp_path, "xquad", "xcopa", evaluation={"items": 3, "benchmarks": ["xquad", "xcopa"]})
    model = AutoModelForCausalLM.from_pretrained(MICRO, dtype=torch.float32)
    ask = METHODS["taco"].ask.model_copy(update={"think_tokens": 12})
    scores, samples = tasks.evaluate(model, AutoTokenizer.from_pretrained(MICRO), made, ("zh", "en"), ask)
    assert {("unparsed" in score) for score in scores if score["lang"] == "zh"} == {True}
    assert not [score for score in scores if score["lang"] == "en" and "unparsed" in score]  # English is asked without a thought
    assert all(sample["thought"].endswith("Response in Chinese:") for sample in samples if sample["lang"] == "zh")
    plain, _ = tasks.evaluate(model, AutoTokenizer.from_pretrained(MICRO), made, ("en",))
    english = [score for score in scores if score["lang"] == "en"]
    assert json.dumps(english) == json.dumps(plain)
    assert made.asked_folder("zh").is_dir()  # what a look inside reads


def test_thoughts_leave_rows_as_they_are():
    row = {"prompt": "q\n", "asked": "q", "id": "0"}
    (thought,) = after_thoughts(Continues(["q\nx\nResponse in Vietnamese: y"]), "vi", [row], METHODS["taco"].ask)
    assert thought == row | {"prompt": "q\nx\nResponse in Vietnamese:", "thought": "x\nResponse in Vietnamese:", "unparsed": False}
