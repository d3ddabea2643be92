"""The measurement for a GPU machine, at miniature size, with what such a machine may lack out of reach; the bound, and the table of bars."""

import subprocess
import sys

import pandas as pd
import pytest
import torch
import transformers

import dsft.step_cost
from dsft.step_cost import ARCHITECTURES, CASES, MINIATURE_AXES, main, multiplications, print_bars, random_batch, small_llama, write_bars

PROGRAM = """
import runpy, sys
sys.modules.update(dict.fromkeys(("datasets", "lm_eval", "nbdev", "papermill")))  # importing them raises ImportError
runpy.run_module("dsft.step_cost", run_name="__main__", alter_sys=True)
"""


def test_the_gpu_measurement_in_miniature(tmp_path):
    sizes = ("--batch_size", "2", "--length", "32", "--repeats", "1")
    command = [sys.executable, "-c", PROGRAM, "--miniature", "--out", str(tmp_path), *sizes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    table = pd.read_csv(tmp_path / "architectures.csv")
    assert list(zip(table["model"], table["case"])) == [(f"{name} (miniature)", case) for name in ARCHITECTURES for case in CASES]
    assert (table["s"] > 0).all() and (table.loc[table["case"] == "tft", "times tft"] == 1).all()
    assert set(table["torch"]) == {torch.__version__} and set(table["transformers"]) == {transformers.__version__}
    assert (tmp_path / "architectures.md").read_text(encoding="utf-8").count("\n") == len(table) + 2

    curves = pd.read_csv(tmp_path / "growth_cpu.csv")
    assert (tmp_path / "growth_cpu.png").stat().st_size > 10_000
    sdpa = curves[curves["attention"] == "sdpa"]
    assert {over: tuple(part["at"].unique()) for over, part in sdpa.groupby("over")} == MINIATURE_AXES
    assert set(sdpa["case"]) == {"tft", "one_pass", "feature"} and (curves[["s", "peak GiB", "bound"]] > 0).all(axis=None)
    # torch trains with flex_attention on a GPU only, and says so; a later one that does on a CPU has its curves here, too
    assert "flex_attention is left out: " in done.stdout or set(curves["attention"]) == {"sdpa", "flex_attention"}


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="the full-size models need a GPU"):
        main()


def test_the_bound_counts_what_the_passes_run():
    """Attention aside, each case's bound is what its passes put through the layers, counted in a model of its own hooks."""
    model, batch = small_llama(6, 32, 100), random_batch(3, 20, 100, torch.device("cpu"))
    batch |= {name: mask.fill_(True) for name, mask in batch.items() if name.endswith("_mask")}  # no padding
    per_token = model.config.hidden_size * (4 * model.config.hidden_size + 3 * model.config.intermediate_size)
    columns = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda layer, args: columns.append(args[0].shape[:2].numel() * (3 if torch.is_grad_enabled() else 1)))
    head = model.config.hidden_size * 100
    labels = {field: batch[field].numel() for field in ("x_en", "y_en", "y_tgt")}
    dsft.step_cost.case_loss(model, batch, "tft", 2, 4)  # probes the model
    for case in ("tft", "truncated", "one_pass", "feature", "positional"):
        columns.clear()
        dsft.step_cost.case_loss(model, batch, case, 2, 4)
        heads = 3 * labels["y_tgt"] + (2 * (labels["x_en"] + labels["y_en"]) if case not in ("tft", "feature") else 0)
        assert multiplications(case, model.config, batch, 2, 4, attention=False) == sum(columns) * per_token + heads * head, case


def test_bars_of_all_benchmarks_are_printed(tmp_path, capsys):
    write_bars([("one", 1.5, ">= 1.50"), ("two", 1.01, "<= 1.00")], tmp_path / "step_cost", "bars")
    write_bars([("three", 2.0, "<= 3")], tmp_path / "speed", "startup_bars")
    assert list(pd.read_csv(tmp_path / "speed" / "startup_bars.csv").columns) == ["what", "measured", "bar", "met"]
    print_bars(tmp_path)
    printed = capsys.readouterr().out
    assert [line.split()[-2:] if line.endswith("NOT met") else line.split()[-1] for line in printed.splitlines() if "= " in line] == ["met", "met", ["NOT", "met"]]
    assert printed.endswith("2 of 3 bars are met\n")
    assert write_bars([("four", 1.0, ">= 2")], "", "bars")["met"].tolist() == [False]  # and nothing is written
    with pytest.raises(KeyError):
        write_bars([("five", 1.0, "2")], tmp_path, "bars")
