"""`train.report_to`: every loss and gradient norm reaches whom it names, and what is not there is refused before anything is trained."""

import json
from pathlib import Path

import pytest
from conftest import ROOT
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from dsft.checks import check
from dsft.files import ParamsError, write_json
from dsft.study import Study
from dsft.training import fine_tune

LOSSES = {"loss", "loss_tft", "loss_lc", "loss_et", "grad_norm", "clipped"}
NORMS = {f"grad_norm_{name}" for name in ("tft", "lc", "et")}


class Told(TrainerCallback):
    """Keeps what a Trainer reports."""

    logs: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def trained(folder: Path, report_to):
    study = Study(
        name="reported",
        models={"micro-llama": {"path": str(ROOT / "models" / "micro-llama")}},
        languages=["zh"],
        methods=["dsft_logits"],
        data={"items": 8},
        train={"batch_size": 4, "per_device_batch_size": 4, "epochs": 1, "bf16": False, "logging_steps": 1, "gradient_norm_steps": 1, "report_to": report_to},
        runs=str(folder / "runs"),
    )
    run = study.run("micro-llama", "zh", "dsft_logits", 0)
    write_json(run.layers_file, {"i": 2, "j": 4})
    return run, fine_tune(run)


def test_every_loss_and_gradient_norm_is_reported(tmp_path, monkeypatch):
    """To a stand-in under the Trainer's own name."""
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Told)
    monkeypatch.setattr(Told, "logs", [])
    _, trainer = trained(tmp_path, "wandb")
    losses = [log for log in Told.logs if "loss" in log]
    norms = [log for log in Told.logs if "grad_norm_tft" in log]
    assert len(losses) == len(norms) == trainer.state.global_step == 2
    assert all(LOSSES <= log.keys() for log in losses) and all(NORMS <= log.keys() for log in norms), (losses, norms)
    kept = [entry["loss_et"] for entry in trainer.state.log_history if "loss" in entry]
    assert [log["loss_et"] for log in losses] == kept


def test_tensorboard_has_them_in_the_study_folder(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, trainer = trained(tmp_path, ["tensorboard"])
    folder = run.study.folder("tensorboard", "micro-llama", "zh", "dsft_logits", "seed0")
    events = loader.EventAccumulator(str(folder)).Reload()
    assert {f"train/{name}" for name in LOSSES | NORMS} <= set(events.Tags()["scalars"])
    kept = [entry["loss_lc"] for entry in trainer.state.log_history if "loss" in entry]
    assert [event.value for event in events.Scalars("train/loss_lc")] == pytest.approx(kept)


def test_what_is_not_there_is_refused_before_training(tmp_path, monkeypatch, capsys):
    def absent():
        raise RuntimeError("it requires wandb to be installed.\nRun `pip install wandb`.")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", absent)
    for name, told in (("wandb", "install its package, or leave it out"), ("wandbb", "the Trainer does not know it; choose from")):
        with pytest.raises(ParamsError, match=f"^train.report_to = '{name}': .*{told}") as refused:
            trained(tmp_path, name)
        assert "\n" not in str(refused.value)
        assert not list((tmp_path / "runs").rglob("checkpoints*"))
        file = tmp_path / "asked.yaml"
        file.write_text(json.dumps({"extends": "smoke", "name": "asked", "train": {"report_to": [name]}, "runs": str(tmp_path / "runs"), "figures": str(tmp_path / "figures")}))
        with pytest.raises(SystemExit, match=f"^dsft: train.report_to = '{name}'"):
            check(str(file))


def test_it_changes_no_run(tmp_path):
    study = lambda names: Study(name="s", models={"m": {"path": "m"}}, languages=["zh"], methods=["tft"], train={"report_to": names}, runs=str(tmp_path))
    assert study(["tensorboard"]).run("m", "zh", "tft", 0).inputs == study([]).run("m", "zh", "tft", 0).inputs
