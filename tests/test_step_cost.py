"""The measurement for a GPU machine, at miniature size, with what such a machine may lack out of reach."""

import subprocess
import sys

import pandas as pd
import pytest
import torch
import transformers

from dsft.step_cost import ARCHITECTURES, CASES, main

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


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="the full-size models need a GPU"):
        main()
