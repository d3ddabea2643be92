"""Trainings with a teacher: what it must not change, what it must teach; in whole trainings of the shipped base."""

from pathlib import Path

import pytest
import torch
from conftest import small_study

from dsft.files import ParamsError
from dsft.training import fine_tune, save_training


def taught(teacher, rows=("tgt",), name="taught") -> dict:
    return {"name": name, "stages": [{"rows": list(rows), "teacher": teacher}]}


def trained(folder, method):
    return fine_tune(small_study(folder, method).run("micro-llama", "zh", method if isinstance(method, str) else method["name"], 0))


def test_a_teacher_without_weight_changes_nothing(tmp_path):
    alone = trained(tmp_path / "alone", {"name": "taught", "stages": [{"rows": ["tgt", "en"]}]})
    weightless = trained(tmp_path / "weightless", taught({"rows": "en-tgt", "weight": 0}, rows=("tgt", "en")))
    assert all(torch.equal(a, b) for a, b in zip(alone.model.parameters(), weightless.model.parameters(), strict=True))
    assert not any("loss_kl" in entry for entry in weightless.state.log_history)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_at_first(tmp_path):
    first, second = [entry for entry in trained(tmp_path, taught({})).state.log_history if "loss" in entry]
    assert first["loss_kl"] == pytest.approx(0, abs=1e-6) and first["loss"] == pytest.approx(first["loss_tft"], rel=1e-4)
    assert second["loss_kl"] == pytest.approx(0, abs=1e-6)  # the first step of the warm-up moves nothing


def test_another_run_teaches_on_its_own_rows(tmp_path):
    fused = {"name": "fused", "stages": [{"rows": [{"instruction": "{i_en} {n_en}", "input": "{i_tgt} {n_tgt}", "output": "{o_tgt}"}]}]}
    filtered = taught({"run": "fused", "rows": fused["stages"][0]["rows"][0], "weight": 0.5, "temperature": 2}, rows=("tgt", "en"))
    two = small_study(tmp_path, fused, filtered)
    run = two.run("micro-llama", "zh", "taught", 0)
    assert [needed.method.name for needed in two.all_trainings()] == ["fused", "taught"]
    save_training(run.needs["fused"], fine_tune(run.needs["fused"]), 0.0, "pytest")
    trainer = fine_tune(run)
    (term,) = trainer.more_terms
    assert term.weight == 0.5 and not any(p.requires_grad or p.grad is not None for p in term.teacher.backbone.root.parameters())
    assert [entry["loss_kl"] > 0 for entry in trainer.state.log_history if "loss" in entry] == [True] * 4
    assert sum(bool(prompt) for prompt in trainer.train_dataset["x_teacher"]) == 16  # the English rows say something else
    save_training(run, trainer, 0.0, "pytest")
    run.check_trained()
    (Path(run.needs["fused"].trained) / "generation_config.json").write_text("{}", encoding="utf-8")  # another teacher by now
    with pytest.raises(ParamsError, match="needs_sha256"):
        run.check_trained()


def test_a_teacher_that_never_says_the_same_is_refused(tmp_path):
    with pytest.raises(ParamsError, match="of no row of the stage do they say the same answer"):
        trained(tmp_path, taught({"rows": "tgt-en"}))


def test_a_student_of_half_the_depth_learns_the_hidden_states_of_the_base(tmp_path):
    half = {"name": "half", "start": {"layers": 2}, "stages": [{"epochs": 4, "teacher": {"weight": 0, "hidden": 1}}]}
    log = [entry for entry in trained(tmp_path, half).state.log_history if "loss" in entry]
    assert log[-1]["loss_hidden"] < log[0]["loss_hidden"]
