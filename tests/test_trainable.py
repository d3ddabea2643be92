"""What each kind of `trainable` leaves alone, in whole trainings of the shipped base, and that a training killed between two passes ends with the same weights."""

import pytest
import torch
from conftest import ROOT, small_study
from transformers import AutoModelForCausalLM

from dsft import training
from dsft.trainable import largest_changes
from dsft.training import fine_tune


def one(name: str, trainable, **stage) -> dict:
    return {"name": name, "stages": [{"trainable": trainable} | stage]}


def weights(folder, method, **train) -> dict[str, torch.Tensor]:
    """What a method makes of the base."""
    name = method if isinstance(method, str) else method["name"]
    return dict(fine_tune(small_study(folder, method, epochs=2, **train).run("micro-llama", "zh", name, 0)).model.named_parameters())


@pytest.fixture(scope="module")
def base() -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(ROOT / "models" / "micro-llama", dtype=torch.float32).named_parameters())


@pytest.fixture(scope="module")
def tft(tmp_path_factory) -> dict[str, torch.Tensor]:
    return weights(tmp_path_factory.mktemp("tft"), "tft")


def same(a: dict, b: dict) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if torch.equal(a[name], b[name])}


@pytest.mark.parametrize("trainable", ["all", {"decay": 1.0}, {"layers": "1-"}])
def test_what_trains_all_weights_alike_is_tft(tmp_path, tft, trainable):
    assert same(weights(tmp_path, one("alike", trainable)), tft) == tft.keys()


def test_frozen_layers_stay_bit_for_bit(tmp_path, base):
    frozen = same(weights(tmp_path, one("frozen", {"layers": "3-"})), base)
    assert frozen == {name for name in base if any(part in name for part in ("embed_tokens", "layers.0.", "layers.1."))}


def test_lower_layers_move_less_with_decay(tmp_path, base, tft):
    decayed = weights(tmp_path, one("decayed", {"decay": 0.5}))
    moved = lambda model, name: float(((model[name] - base[name]).norm() / (tft[name] - base[name]).norm()).detach())
    ratios = [moved(decayed, f"model.layers.{k}.mlp.down_proj.weight") for k in range(6)]
    assert all(low < high for low, high in zip(ratios, ratios[1:])) and ratios[0] < 0.1


def test_sparse_training_changes_nothing_outside_its_mask(tmp_path, base):
    run = small_study(tmp_path, one("sparse", {"sparse": 0.05, "l1": 0.1}), epochs=2).run("micro-llama", "zh", "sparse", 0)
    sparse = dict(fine_tune(run).model.named_parameters())
    dense = dict(AutoModelForCausalLM.from_pretrained(run.checkpoints / "stage1-model").named_parameters())
    matrices = {name: p.detach() for name, p in base.items() if p.dim() > 1}
    mask = largest_changes(matrices, {name: dense[name].detach() for name in matrices}, 0.05)
    changed = sum(int((base[name] != sparse[name]).sum()) for name in matrices)
    assert 0 < changed <= round(0.05 * sum(p.numel() for p in matrices.values()))
    assert not any(bool((base[name] != sparse[name])[~mask[name]].any()) for name in matrices)
    assert {name for name in base if base[name].dim() == 1} <= same(base, sparse)


def test_a_sparse_training_killed_between_its_passes_ends_with_the_same_weights(tmp_path, monkeypatch):
    method = one("sparse", {"sparse": 0.05})
    whole = weights(tmp_path / "whole", method)
    leave = training._leave_stage

    def killed(*args):
        leave(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_leave_stage", killed)
    with pytest.raises(KeyboardInterrupt):
        weights(tmp_path / "killed", method)
    monkeypatch.setattr(training, "train_stage", lambda *args, train=training.train_stage: pytest.fail("trained again") if args[3] == 1 else train(*args))
    assert same(weights(tmp_path / "killed", method), whole) == whole.keys()


def test_the_pull_towards_the_start_shortens_the_way(tmp_path, base):
    way = lambda model: float(torch.stack([(model[name] - base[name]).abs().sum() for name in base]).sum().detach())
    free, pulled = (weights(tmp_path / name, one(name, {"sparse": 1.0, "l1": l1})) for name, l1 in (("free", 0.0), ("pulled", 1e5)))
    assert way(pulled) < way(free)


def test_tokens_change_so_many_rows_and_nothing_else(tmp_path, base):
    trained = weights(tmp_path, one("tokens", {"tokens": 7}))
    table = "model.embed_tokens.weight"
    assert same(trained, base) == base.keys() - {table}
    assert int((trained[table] != base[table]).any(dim=1).sum()) == 7


def test_weight_decay_is_refused_with_a_mask(tmp_path):
    for trainable in ({"sparse": 0.1}, {"tokens": 3}):
        with pytest.raises(ValueError, match="weight_decay = 0.1: it would change"):
            small_study(tmp_path, one("masked", trainable), weight_decay=0.1)
