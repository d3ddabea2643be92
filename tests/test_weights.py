"""Models that are sums of what runs have learned: trainings of the shipped base carried to another base, and what the graph makes of such a method."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from transformers import AutoModelForCausalLM

from dsft.files import ParamsError
from dsft.study import Study, load_study
from dsft.training import fine_tune, save_training
from dsft.weights import combined, save_combined

BASE = str(ROOT / "models" / "micro-llama")
METHODS = [
    {"name": "lang", "stages": [{"trainable": {"sparse": 0.04}}]},
    {"name": "task", "stages": [{"rows": ["en"], "trainable": {"sparse": 0.05}}]},
    {"name": "both", "weights": {"lang": 1, "task": 1}},
    {"name": "turned", "weights": {"task": 1, "lang": 1}},
    {"name": "moved", "weights": {"old-base/lang": 1}},
]


def weights(path: str) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).named_parameters())


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    """A study of two models with the same base and another one, its two sparse trainings done under `old-base` and under `micro-llama`."""
    folder = tmp_path_factory.mktemp("weights")
    new = AutoModelForCausalLM.from_pretrained(BASE)
    with torch.no_grad():
        for n, p in enumerate(new.parameters()):
            p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(n))
    new.save_pretrained(folder / "new")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "new" / name).write_bytes((ROOT / "models" / "micro-llama" / name).read_bytes())
    made = Study(
        name="sums",
        models={"micro-llama": {"path": BASE}, "old-base": {"path": BASE}, "new": {"path": str(folder / "new")}},
        languages=["zh"],
        methods=METHODS,
        data={"items": 8},
        train={"batch_size": 8, "per_device_batch_size": 8, "epochs": 2, "learning_rate": 1e-3, "bf16": False},
        runs=str(folder / "runs"),
    )
    for model, method in (("micro-llama", "lang"), ("micro-llama", "task"), ("old-base", "lang")):
        run = made.run(model, "zh", method, 0)
        save_training(run, fine_tune(run), 0.0, "pytest")
    return made


def test_a_run_carried_to_its_own_base_is_that_run(study):
    run = study.run("micro-llama", "zh", "moved", 0)
    save_combined(run, combined(run), 0.0, "pytest")
    run.check_trained()
    moved, trained = weights(run.trained), weights(study.run("old-base", "zh", "lang", 0).trained)
    assert all(torch.equal(moved[name], trained[name]) for name in trained)
    assert "Made without training: to the base is added 1 times what old-base/lang has learned from its own." in (Path(run.trained) / "README.md").read_text(encoding="utf-8")


def test_a_run_carried_to_another_base_changes_it_by_what_was_learned(study):
    moved = dict(combined(study.run("new", "zh", "moved", 0)).named_parameters())
    new, old, trained = (weights(path) for path in (study.base("new"), BASE, study.run("old-base", "zh", "lang", 0).trained))
    for name in new:
        assert torch.equal(moved[name], (new[name].double() + (trained[name].double() - old[name].double())).float())


def test_a_language_and_a_task_add_up_in_any_order(study):
    one, other = (dict(combined(study.run("micro-llama", "zh", name, 0)).named_parameters()) for name in ("both", "turned"))
    base, lang, task = (weights(path) for path in (BASE, *(study.run("micro-llama", "zh", name, 0).trained for name in ("lang", "task"))))
    for name in base:
        assert torch.equal(one[name], other[name])
        only = (lang[name] != base[name]) & (task[name] == base[name])  # what the task has left alone is the language's
        assert torch.equal(one[name][only], lang[name][only])


def test_models_that_are_not_alike_are_refused(study, tmp_path):
    small = Study(**study.model_dump() | {"name": "small", "models": {"old-base": {"path": BASE}, "micro-qwen": {"path": str(ROOT / "models" / "micro-gemma2")}}, "runs": study.runs})
    run = small.run("micro-qwen", "zh", "moved", 0)
    (needed,) = run.needs.values()
    AutoModelForCausalLM.from_pretrained(BASE).save_pretrained(needed.trained)
    with pytest.raises(ParamsError, match="weights: old-base/lang and the base are not alike: "):
        combined(run)


def test_the_graph_trains_what_a_sum_needs(tmp_path):
    told = {"models": {"new": {"path": BASE}, "old-base": {"path": BASE}}, "languages": ["zh"], "methods": ["transfer"]}
    told |= {"runs": str(tmp_path / "runs"), "figures": str(tmp_path / "figures")}
    (tmp_path / "sum.yaml").write_text(yaml.safe_dump(told), encoding="utf-8")
    assert {(run.model, run.method.name) for run in load_study(tmp_path / "sum.yaml").all_trainings()} == {("new", "transfer"), ("old-base", "transfer"), ("old-base", "tft")}
    command = ["snakemake", "--profile", "params/profiles/local", "--config", f"study={tmp_path / 'sum.yaml'}", "--cores", "2", "--dry-run"]
    plan = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
    jobs = Counter(re.findall(r"^(?:local)?rule (combine|train|evaluate):$", plan, re.MULTILINE))
    assert jobs == {"combine": 2, "train": 1, "evaluate": 2}, plan[-3000:]
