"""What `make help` lists and what `make clean` removes; neither installs anything."""

import fcntl
import re
import subprocess
from pathlib import Path

from conftest import ROOT


def make(target: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(["make", "--no-print-directory", "-f", ROOT / "Makefile", target], cwd=folder, text=True, capture_output=True)


def test_help_lists_every_target_in_a_line(tmp_path):
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1].split()
    told = make("help", tmp_path)
    assert told.returncode == 0 and not list(tmp_path.iterdir())
    lines = told.stdout.splitlines()
    assert sorted(line.split()[1] for line in lines) == sorted(targets)
    assert all(len(line) < 120 and len(line.split()) > 3 for line in lines), lines


RESULTS = ["runs/s/m/zh/tft/seed0/metrics.json", "runs/s/m/zh/tft/seed0/model/model.safetensors", "runs/s/m/zh/tft/seed0/train_log.jsonl", "runs/s/results.json"]
RESULTS += ["runs/s/m/zh/tft/seed0/checkpoints-1/checkpoint-2/optimizer.pt", "figures/s/table1.md", "models/m/model.safetensors", "nbs/index.ipynb", ".snakemake/metadata/x"]
AGAIN = ["runs/s/m/zh/tft/seed0/train.ipynb", "runs/s/m/zh/tft/seed0/train.stderr", "runs/s/analysis/table1.ipynb", "runs/rehearsal/s/metrics.json", "runs/step_cost.ipynb"]
AGAIN += [".snakemake/log/x.log", "dsft/__pycache__/x.pyc", "nbs/.ipynb_checkpoints/index.ipynb", ".pytest_cache/x", ".venv/lib/__pycache__/x.pyc"]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_clean_removes_what_can_be_made_again_and_no_result(tmp_path):
    for name in (*RESULTS, *AGAIN):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with (tmp_path / "runs" / "s" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = make("clean", tmp_path)
        assert refused.returncode and "a study is running" in refused.stderr and len(files(tmp_path)) == len(RESULTS) + len(AGAIN) + 1
    done = make("clean", tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("removing: ") and "kept: every result" in done.stdout
    assert files(tmp_path) == {*RESULTS, "runs/s/.lock", ".venv/lib/__pycache__/x.pyc"}
    assert make("clean", tmp_path / "figures").returncode == 0  # where there is nothing


def test_git_takes_packed_runs_and_leaves_run_folders():
    ignored = lambda path: subprocess.run(["git", "check-ignore", "--quiet", path], cwd=ROOT).returncode == 0
    assert ignored("runs/micro/micro-llama/zh/tft/seed0/metrics.json") and not ignored("figures/micro/runs/micro-llama_zh_tft_seed0.tar.xz")
