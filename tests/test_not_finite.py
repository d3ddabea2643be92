"""NaN or infinity in a loss or a gradient stops the training: the step, the loss and the examples are named, and the batch and the weights are kept."""

import json
import os
import subprocess
import sys
from math import isfinite, nan

import pytest
import tiny
import torch
import transformers

from dsft.files import ParamsError
from dsft.not_finite import NotFinite, culprits, example_names, replay
from dsft.losses import terms_of
from dsft.trainer import DSFTTrainer
from test_trainer_arguments import arguments, batch_of

ORDER = {"train_sampling_strategy": "sequential"}


def spoilt(token: int, value: float = nan):
    """The tiny model with a damaged embedding of one token."""
    model = tiny.model()
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = value
    return model


def rows(damaged: dict[int, str], n: int = 16):
    """Parallel rows in which token 96 stands in one field of some rows, and nowhere else."""
    clean = lambda ids: [token % 96 for token in ids]
    made = [{name: clean(value) if name != "id" else f"id{value}" for name, value in row.items()} for row in tiny.data(n)]
    for number, field in damaged.items():
        made[number][field] = [made[number][field][0], 96, 5]
    return tiny.datasets.Dataset.from_list(made)


def stopped(folder, model, data, supervisions="logits", **more) -> str:
    """What the training says that stops."""
    trainer = tiny.trainer(folder, supervisions, lm=model, **{**ORDER, "per_device_train_batch_size": 4, **more})
    trainer.train_dataset = data
    before = {name: p.clone() for name, p in model.state_dict().items()} if more.get("max_steps") == 1 else None
    with pytest.raises(NotFinite) as error:
        trainer.train()
    if before:
        assert all(torch.equal(p.nan_to_num(), before[name].nan_to_num()) for name, p in model.state_dict().items())  # the weights have not moved
    assert "\n" not in str(error.value) and isinstance(error.value, ParamsError)
    return str(error.value)


@pytest.mark.parametrize("value", [nan, float("inf")])
@pytest.mark.parametrize(
    ("supervisions", "field", "loss"),
    [
        ("tft", "y_tgt", "TFT is nan on id6"),
        ("tft", "x_tgt", "TFT is nan on id6"),
        ("logits", "x_en", "LC (logits, layer 1) is nan on id6"),
        ("logits", "y_en", "ET (logits, layer 2) is nan on id6"),
        ("feature", "x_en", "LC (feature, layer 1) is nan on id6; ET (feature, layer 2) is nan on id6"),
    ],
)
def test_the_loss_and_the_example_are_named(tmp_path, supervisions, field, loss, value):
    told = stopped(tmp_path, spoilt(96, value), rows({6: field}), supervisions)
    assert told.startswith(f"step 2: {loss}; stopped before the weights changed: lower the learning rate, or mend the examples; ")
    folder = tmp_path / "stopped-step-2"
    assert f"dsft.not_finite.replay({str(folder)!r}) computes it again" in told
    assert sorted(file.suffix for file in folder.iterdir() if file.suffix not in (".json", ".safetensors")) == []  # nothing is pickled
    kept = json.loads((folder / "stopped.json").read_text())
    assert (kept["when"], kept["found"], kept["autocast"]) == ("step 2", loss, "no")
    (again,) = replay(folder)
    names = [words.split(" ")[0].lower() for words in loss.split("; ")]
    assert {*names, "loss", "gradient"} <= {name for name, found in again.items() if not isfinite(found)}


def test_the_replay_is_of_the_step_and_of_its_weights(tmp_path):
    """The losses of the other batches, too: a run of three steps that stops at the third has the weights of a run of two."""
    data = rows({9: "y_en"})
    two = tiny.trainer(tmp_path / "two", lm=spoilt(96), max_steps=2, per_device_train_batch_size=4, **ORDER)
    two.train_dataset = data
    two.train()
    stopped(tmp_path, spoilt(96), data)
    kept = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stopped-step-3")
    for name, p in two.model.state_dict().items():
        assert torch.equal(kept.state_dict()[name].nan_to_num(), p.nan_to_num())
    whole = replay(tmp_path / "stopped-step-3", tiny.model())[0]
    assert all(map(isfinite, whole.values())) and whole["loss"] == pytest.approx(whole["tft"] + whole["lc"] + whole["et"], rel=1e-5)


def test_accumulated_batches_and_several_rows(tmp_path):
    told = stopped(tmp_path, spoilt(96), rows({1: "y_en", 4: "x_en", 6: "x_en", 7: "y_tgt"}), per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert told.startswith("step 1: ET (logits, layer 2) is nan on id1; LC (logits, layer 1) is nan on id4; LC (logits, layer 1) is nan on id6; TFT is nan on id7; ")
    assert len(replay(tmp_path / "stopped-step-1")) == 3  # the batches without them are not kept


def test_a_gradient_alone(tmp_path):
    model = tiny.model()
    model.model.layers[1].mlp.up_proj.weight.register_hook(lambda gradient: gradient * nan)
    told = stopped(tmp_path, model, rows({}), max_steps=1)
    assert told.startswith("step 1: the gradient of TFT is nan on id0, id1, id2, id3; the gradient of ET (logits, layer 2) is nan on id0, ")
    assert "gradient of LC" not in told  # which ends below


def test_a_learning_rate_that_is_too_high(tmp_path):
    told = stopped(tmp_path, tiny.model(), rows({}), "tft", learning_rate=1e30, max_grad_norm=0.0)
    assert told.startswith("step 2: TFT is nan on id4, id5, id6, id7; ")


def test_what_no_example_does_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("dsft.trainer.culprits", lambda *_: [])
    told = stopped(tmp_path, spoilt(96), rows({2: "y_en"}))
    assert told.startswith("step 1: tft, lc, et not finite, on no example alone; ")
    assert len(replay(tmp_path / "stopped-step-1")) == 1


def test_rows_are_found_without_ids(tmp_path):
    assert "step 2: ET (logits, layer 2) is nan on row 6; " in stopped(tmp_path, spoilt(96), rows({6: "y_en"}).remove_columns("id"))
    assert "is nan on row 6; " in stopped(tmp_path, spoilt(96), list(rows({6: "y_en"})))
    twice = rows({6: "y_en"}).select([6, 6])
    assert example_names(twice, batch_of(twice))[0] == "id6 or id6"


@pytest.mark.parametrize("when", ["evaluate", "between"])
def test_an_evaluation_stops_too(tmp_path, when):
    more = {"eval_strategy": "steps", "eval_steps": 2} if when == "between" else {}
    trainer = tiny.trainer(tmp_path, lm=spoilt(96), eval_dataset=rows({5: "x_en"}), per_device_eval_batch_size=2, **more)
    trainer.train_dataset = rows({})
    with pytest.raises(NotFinite, match=r"^eval after step [02]: LC \(logits, layer 1\) is nan on (id5|row 5); ") as error:
        trainer.evaluate() if when == "evaluate" else trainer.train()
    (folder,) = tmp_path.glob("stopped-*")
    assert str(folder) in str(error.value) and len(replay(folder)) == 1


def test_a_disk_that_is_full_for_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(DSFTTrainer, "save_model", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    told = stopped(tmp_path, spoilt(96), rows({2: "y_en"}))
    assert "computes it, with a model of yours, again" in told
    with pytest.raises(ParamsError, match="not readable as a model"):
        replay(tmp_path / "stopped-step-1")
    assert not isfinite(replay(tmp_path / "stopped-step-1", spoilt(96))[0]["et"])


def test_adapters_and_half_precision(tmp_path):
    peft = pytest.importorskip("peft")
    base = spoilt(96)
    base.save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    told = stopped(tmp_path, adapted, rows({2: "y_en"}), bf16=True)
    assert told.startswith("step 1: ET (logits, layer 2) is nan on id2; ")
    assert not isfinite(replay(tmp_path / "stopped-step-1")[0]["et"])


def test_finite_rows_have_no_culprit():
    terms = terms_of(tiny.SUPERVISIONS["mixed"], tiny.LAYERS)
    assert culprits(tiny.model(), batch_of(tiny.data(3)), terms) == []


def test_the_look_costs_one_read_a_step(tmp_path, monkeypatch):
    """Of the losses and the norm together, and nothing a micro-batch."""
    looks, own = [], DSFTTrainer._require_finite
    monkeypatch.setattr(DSFTTrainer, "_require_finite", lambda self, norm: looks.append(self.state.global_step) or own(self, norm))
    tiny.trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=3).train()
    assert looks == [0, 1, 2]
