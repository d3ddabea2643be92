"""Every method that has a name trains and is evaluated, small: two steps of eight examples on the microcosm's base, four items."""

import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsft.data_selection import chosen, needs_model, pool, scores
from dsft.files import write_json, write_jsonl
from dsft.generation import load_base
from dsft.methods import METHODS
from dsft.study import Run, Study
from dsft.tasks import evaluate
from dsft.training import fine_tune, load_recipe, recipe_options, save_training
from dsft.weights import combined, save_combined

BASE = str(Path(__file__).parents[1] / "models" / "micro-llama")


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
            found, _ = scores(run, stage.select, rows, *(load_base(run) if needs_model(stage.select) else (None, None)))
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
