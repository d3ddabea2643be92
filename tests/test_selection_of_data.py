"""Which rows are trained on: the size, the languages, what guides the choice, and that a training reads it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsft.benchmark_items import BENCHMARK_SEED
from dsft.data_selection import chosen, development_questions, fit_rule, pool, probe_losses, probe_subsets, scores, transport_gradients
from dsft.files import ParamsError, write_json
from dsft.methods import Method, Select
from dsft.microcosm import World
from dsft.study import Study
from dsft.training import fine_tune, training_rows

MICRO = ROOT / "models" / "micro-llama"


@pytest.fixture(scope="module")
def loaded():
    return AutoModelForCausalLM.from_pretrained(MICRO, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(MICRO)


def study(folder: Path, *methods) -> Study:
    return Study(
        name="selection", models={"m": {"path": str(MICRO)}}, languages=["zh", "vi"], methods=methods, data={"items": 40}, runs=str(folder),
        evaluation={"items": 8, "benchmarks": ["xquad", "xcopa", "mkqa", "flores"]},
        train={"max_steps": 2, "batch_size": 4, "per_device_batch_size": 4, "learning_rate": 1e-3, "bf16": False, "logging_steps": 1},
    )  # fmt: skip


def test_exactly_as_many_as_the_share_says():
    rng = np.random.default_rng(0)
    for number in (1, 7, 100):
        ids, values = [f"{n}" for n in range(number)], rng.integers(0, 3, number)
        for keep in (0.01, 0.25, 1.0):
            kept = chosen(ids, values, keep)
            assert len(kept) == len(set(kept)) == max(1, round(keep * number)) and kept == [name for name in ids if name in set(kept)]
            lost = set(ids) - set(kept)
            assert not lost or max(values[int(name)] for name in lost) <= min(values[int(name)] for name in kept)


@pytest.mark.parametrize("by", ["quality", "transport", "length", "random"])
def test_the_same_ids_in_every_language(tmp_path, loaded, by):
    select = Select(by=by, keep=0.25)
    made = study(tmp_path, Method(name="some", stages=[{"select": select}]))
    kept = []
    for lang in ("zh", "vi"):
        run = made.run("m", lang, "some", 0)
        rows = pool(run, run.method.stages[0])
        kept.append(chosen([row["id"] for row in rows], scores(run, select, rows, *loaded)[0], 0.25))
    assert kept[0] == kept[1] and len(kept[0]) == 10
    assert made.run("m", "zh", "some", 0).selected_rows == made.run("m", "vi", "some", 0).selected_rows


def test_no_item_of_the_test_guides_the_choice(tmp_path):
    made = study(tmp_path, "tft")
    world = World()
    for lang in ("en", "zh"):
        questions = {question for question, _ in development_questions(made, lang)}
        for name in ("xquad", "xcopa", "mkqa"):
            assert not questions & {item[lang]["query"] for item in world.benchmark(name, 500, BENCHMARK_SEED)}
            assert questions & {item[lang]["query"] for item in world.benchmark(name, 50, BENCHMARK_SEED, "dev")}


def test_the_rule_is_fitted_by_least_squares():
    rng = np.random.default_rng(1)
    means, noise = rng.normal(size=(200, 3)), rng.normal(size=200) * 1e-3
    assert np.allclose(fit_rule(means, 1.5 + means @ [1.0, 0.0, -2.0] + noise), [1.0, 0.0, -2.0], atol=1e-3)


def test_probes_are_windows_and_leave_the_model_as_it_was(loaded):
    model, _ = loaded
    indicators = np.random.default_rng(0).normal(size=(30, 3))
    subsets = probe_subsets(indicators, 8)
    for number, subset in enumerate(subsets):
        ranks = np.argsort(np.argsort(indicators[:, number % 3]))[subset]
        assert len(set(subset)) == 8 and ranks.max() - ranks.min() == 7
    before = {name: value.clone() for name, value in model.state_dict().items()}
    examples = [([5, 6, n], [7, 8]) for n in range(9, 39)]
    losses = probe_losses(model, examples, examples[:4], subsets[:2], 1e-2)
    assert losses[0] != losses[1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and all(p.requires_grad for p in model.parameters())


def test_transport_prefers_what_looks_like_the_target():
    rng = np.random.default_rng(2)
    target, other = rng.normal(size=(80, 6)), rng.normal(size=(50, 6)) + 4.0
    gradients = transport_gradients(np.concatenate([other, rng.normal(size=(50, 6))]), target)
    assert gradients[50:].max() < gradients[:50].min()
    same = transport_gradients(target, target)
    assert same.std() < 0.1 * gradients.std()


def select_rows(run, loaded):
    """What nbs/experiments/select_rows.ipynb leaves."""
    stages = {}
    for number, stage in enumerate(run.method.stages, 1):
        if stage.select:
            rows = pool(run, stage)
            stages[str(number)] = {"ids": chosen([row["id"] for row in rows], scores(run, stage.select, rows, *loaded)[0], stage.select.keep)}
    write_json(run.selected_rows, {"stages": stages, "provenance": {"files": run.pool_files}})


def test_training_reads_the_selection(tmp_path, loaded):
    made = study(tmp_path, "mining_length", "tft")
    run = made.run("m", "zh", "mining_length", 0)
    with pytest.raises(ParamsError, match="the selection of rows is not there; make it with: papermill nbs/experiments/select_rows.ipynb"):
        training_rows(run, run.method.stages[0])
    select_rows(run, loaded)
    kept = json.loads(run.selected_rows.read_text())["stages"]["1"]["ids"]
    for lang in ("zh", "vi"):
        other = made.run("m", lang, "mining_length", 0)
        trained = training_rows(other, other.method.stages[0])[0].to_list()
        assert [row["id"] for row in trained] == kept and len(kept) == 10
    whole = training_rows(made.run("m", "zh", "tft", 0), made.run("m", "zh", "tft", 0).method.stages[0])[0].to_list()
    shortest = min(len(row["y_en"]) for row in whole if row["id"] in kept)
    assert all(len(row["y_en"]) <= shortest for row in whole if row["id"] not in kept)
    run.check_inputs()
    assert fine_tune(run).state.global_step == 2


def test_plain_text_is_selected_for_the_first_stage_only(tmp_path, loaded):
    made = study(tmp_path, "gotd", "tft")
    run = made.run("m", "zh", "gotd", 0)
    select_rows(run, loaded)
    text, tgt = (training_rows(run, stage)[0].to_list() for stage in run.stages)
    assert len(text) == 40 and {row["x_tgt"] for row in text} == {""}
    assert tgt == training_rows(made.run("m", "zh", "tft", 0), run.stages[1])[0].to_list()
    assert run.selected_rows != made.run("m", "vi", "gotd", 0).selected_rows  # documents are of one language


def test_a_selection_from_other_data_is_refused(tmp_path, loaded):
    made = study(tmp_path, "mining_random")
    run = made.run("m", "zh", "mining_random", 0)
    write_json(run.selected_rows, {"stages": {"1": {"ids": ["nothing"]}}, "provenance": {}})
    with pytest.raises(ParamsError, match="1 of its rows are not among those of the data"):
        training_rows(run, run.method.stages[0])
