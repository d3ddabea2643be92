"""Every method that has a name trains and is evaluated, small: two steps of eight examples on the microcosm's base, four items."""

import time
from pathlib import Path

import papermill
import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsft.data_selection import chosen, needs_model, pool, scores
from dsft.files import write_json, write_jsonl
from dsft.generation import load_generator
from dsft.methods import METHODS
from dsft.study import Run, Study, load_recipe, load_study
from dsft.tasks import evaluate
from dsft.training import fine_tune, recipe_options, save_training
from dsft.weights import combined, save_combined

ROOT = Path(__file__).parents[1]
BASE = str(ROOT / "models" / "micro-llama")


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    study = Study(
        name="all",
        models={"micro-llama": {"path": BASE}, "old-base": {"path": BASE}},
        languages=["zh", "vi"],
        methods=list(METHODS),
        data={"items": 24, "held_out": 4},
        train={"max_steps": 2, "batch_size": 8, "per_device_batch_size": 8, "learning_rate": 1e-3, "bf16": False, "logging_steps": 1},
        evaluation={"benchmarks": ["xquad", "xcopa", "flores"], "items": 4, "max_new_tokens": 4, "max_translation_tokens": 8},
        runs=str(tmp_path_factory.mktemp("runs")),
    )
    for model in study.models:
        write_json(study.folder(model, "zh", "layers.json"), {"i": 1, "j": 5})
    return study


def select(run: Run) -> None:
    """What nbs/experiments/select_rows.ipynb leaves."""
    stages = {}
    for number, stage in enumerate(run.method.stages, 1):
        if stage.select:
            rows = pool(run, stage)
            found, _ = scores(run, stage.select, rows, *(load_generator(run, run.base) if needs_model(stage.select) else (None, None)))
            stages[str(number)] = {"ids": chosen([row["id"] for row in rows], found, stage.select.keep)}
    write_json(run.selected_rows, {"stages": stages})


def make(run: Run) -> None:
    """Train the run, after those that it needs."""
    if Path(run.trained).exists():
        return
    for needed in run.needs.values():
        make(needed)
    for recipe in run.method.recipes:
        rows, _ = load_recipe(recipe).rows(run, recipe_options(run.study, recipe))
        write_jsonl(run.recipe_rows, [{"recipe": recipe} | row for row in rows])
    if run.method.selects:
        select(run)
    if run.method.weights:
        save_combined(run, combined(run), time.time(), "test")
    else:
        save_training(run, fine_tune(run), time.time(), "test")


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_and_answers(study, name):
    run = study.run("micro-llama", "zh", name, 0)
    if run.method.made:
        make(run)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run.trained), AutoTokenizer.from_pretrained(run.trained)
    scores, samples = evaluate(model, tokenizer, study, ("zh", "en"), run.method.ask)
    assert {(s["dataset"], s["lang"]) for s in scores} >= {("xquad", "zh"), ("xquad", "en"), ("xcopa", "zh"), ("flores", "en-zh"), ("flores", "zh-en")}
    assert all(s["items"] == 4 for s in scores) and len(samples) == 4 * len({(s["dataset"], s["lang"]) for s in samples})


def test_every_comparator_names_its_paper_or_is_a_control():
    controls = {"base", "sft", "tft", "tft_en", "mining_length", "mining_random", "gotd_random", "interlinear", "bistil_alone"}
    ours = {"dsft_logits_balanced", "dsft_feature_balanced", "dsft_logits_decay"}
    assert {name for name, method in METHODS.items() if not method.source} == controls | ours


def test_a_base_that_reads_bytes_is_pretrained_trains_and_answers(tmp_path):
    """MonoByte: whatever is written, a token is a byte of it."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 259, "tokens": 20_000, "batch_size": 8}
    given = {"models": {"bytes": {"pretrain": sizes}}, "languages": ["zh"], "methods": ["tft"], "data": {"items": 8, "held_out": 4, "max_length": 1024}}
    given |= {"train": {"max_steps": 2, "batch_size": 4, "per_device_batch_size": 4, "bf16": False}, "evaluation": {"benchmarks": ["xquad", "xcopa"], "items": 4, "max_new_tokens": 8}}
    file = tmp_path / "bytes.yaml"
    file.write_text(yaml.safe_dump(given | {"runs": str(tmp_path / "runs")}), encoding="utf-8")
    papermill.execute_notebook(ROOT / "nbs/experiments/pretrain.ipynb", tmp_path / "out.ipynb", {"study": str(file), "model": "bytes"}, cwd=ROOT, progress_bar=False)
    study = load_study(file)
    run = study.run("bytes", "zh", "tft", 0)
    tokenizer = AutoTokenizer.from_pretrained(run.base)
    for text in ("Anna lives in Hanoi.\n", "安娜住在河内。", "Anna sống ở Hà Nội", "تعيش آنا", "🙂"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    make(run)
    model = AutoModelForCausalLM.from_pretrained(run.trained)
    assert model.get_input_embeddings().num_embeddings == 259
    scores, samples = evaluate(model, tokenizer, study, ("zh", "en"))
    assert {(s["dataset"], s["lang"]) for s in scores} == {(name, lang) for name in ("xquad", "xcopa") for lang in ("zh", "en")} and len(samples) == 16
