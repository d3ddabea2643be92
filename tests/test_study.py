"""The main job end to end: `make study` on a small study, a second time, and with mistakes in the study file; killed it is in test_survival."""

import json
import os
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import yaml

from dsft.files import ParamsError
from dsft.methods import Weight
from dsft.study import load_study

ROOT = Path(__file__).parents[1]
BRIDGE = {"name": "bridge", "stages": [{"rows": ["en", "translate"]}]}  # a method that needs no code
METHODS = ["base", "tft", "dsft_logits", "bridge"]
OUTSIDE = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}  # as if no `make test` ran around it


def write_study(folder: Path, name: str, **changes) -> Path:
    """params/smoke.yaml with one language and fewer methods, writing to `folder`, as a study of its own."""
    study = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text(encoding="utf-8"))
    study |= {"languages": ["zh"], "methods": [*METHODS[:-1], BRIDGE], "runs": str(folder / "runs"), "figures": str(folder / "figures")}
    study["train"] |= {"batch_size": 8, "per_device_batch_size": 8}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(study | changes), encoding="utf-8")
    return path


def make(study: Path) -> subprocess.CompletedProcess:
    command = ["make", "study", f"STUDY={study}", "CORES=2"]
    return subprocess.run(command, cwd=ROOT, env=OUTSIDE, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path]:
    """A study that ran undisturbed: its file and its folder."""
    folder = tmp_path_factory.mktemp("study")
    study = write_study(folder, "quiet")
    result = make(study)
    assert result.returncode == 0, result.stdout[-5000:]
    assert re.search(r"^(\d+) of \1 steps in ", result.stdout, re.MULTILINE) and "table1.md" in result.stdout
    return study, folder


def test_study_writes_every_run_and_table(finished):
    study, folder = finished
    for method in METHODS:
        run = folder / "runs" / "quiet" / "mini-llama" / "zh" / method / "seed0"
        metrics = json.loads((run / "metrics.json").read_text())
        items = {(s["dataset"], s["lang"]): s["items"] for s in metrics["scores"]}
        assert items == {(d, x): n for d, n in (("xquad", 24), ("xcopa", 24), ("instructions", 24)) for x in ("zh", "en")}
        assert len((run / "samples.jsonl").read_text().splitlines()) == 6 * 24
        assert json.loads((run / "provenance.json").read_text())["commit"]
        assert yaml.safe_load((run / "params.yaml").read_text())["method"] == method
        if method != "base":
            log = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
            assert log[-1]["step"] == (16 if method == "bridge" else 8) and log[-1]["loss_tft"] > 0
            assert (log[-1]["loss_lc"] > 0) == (method == "dsft_logits")
            assert not list(run.glob("checkpoints-*"))
    table = pd.read_csv(folder / "figures" / "quiet" / "table1.csv")
    assert list(table) == ["model", "method", "dataset", "lang", "metric", "value", "sd", "seeds", "items", "published"]
    assert set(table["method"]) == set(METHODS)
    assert (folder / "figures" / "quiet" / "figure2.svg").stat().st_size > 1000


def test_a_second_time_nothing_is_done(finished):
    study, folder = finished
    written = sorted(path for part in ("runs/**/metrics.json", "figures/**/*.csv") for path in folder.glob(part))
    before = [p.stat().st_mtime_ns for p in written]
    result = make(study)
    assert result.returncode == 0 and "study quiet: 4 of 4 runs finished" in result.stdout, result.stdout[-3000:]
    assert not re.search(r"\d+ of \d+ steps", result.stdout), result.stdout[-3000:]
    assert [p.stat().st_mtime_ns for p in written] == before


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"methods": ["tfft"]}, "methods.0 = 'tfft': no method of that name"),
        ({"layers": {"i": 3, "j": 3}}, "layers: layer i = 3 must lie below layer j = 3"),
        ({"layers": {"i": 1, "j": 9}}, "layers.j = 9: mini-llama has layers 1 to 4"),
        ({"learning_rate": 1}, "learning_rate = 1: unknown field"),
        ({"data": {"source": "files", "files": {"en": "none.json", "zh": "none.json"}, "held_out": 1}}, "data.files.en = 'none.json': no such file"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, changes, told):
    result = make(write_study(tmp_path, "mistaken", **changes))
    assert result.returncode != 0
    ours = [line for line in result.stdout.splitlines() if not line.startswith("make:")]
    assert len(ours) == 1 and ours[0].startswith("dsft: ") and told in ours[0], result.stdout
    assert not (tmp_path / "runs").exists() and not (tmp_path / "figures").exists()


def test_data_that_are_not_parallel_are_one_line(tmp_path):
    for lang, count in (("en", 3), ("zh", 2)):
        items = [{"instruction": "?", "input": "", "output": "!"}] * count
        (tmp_path / f"{lang}.json").write_text(json.dumps(items), encoding="utf-8")
    files = {lang: str(tmp_path / f"{lang}.json") for lang in ("en", "zh")}
    result = make(write_study(tmp_path, "lopsided", data={"source": "files", "files": files, "held_out": 1}))
    assert result.returncode != 0 and "not parallel" in result.stdout and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("weight", "told"), (
    ("heavy", "weight = 'heavy': give a number, balanced, or {value, share, every, schedule}"),
    ("-1", "weight = -1: Input should be greater than or equal to 0"),
    (".inf", "weight = inf: Input should be a finite number"),
    ("{share: 0.5}", "weight: `share` belongs to value: balanced; remove it, or balance the weight"),
    ("{value: balanced, share: 0}", "weight.share = 0: Input should be greater than 0"),
    ("{value: balanced, every: 0}", "weight.every = 0: Input should be greater than 0"),
    ("{value: equal}", "weight.value = 'equal': give a number, balanced, or {value, share, every, schedule}"),
    ("{value: 0}", "weight.value = 0: Input should be greater than 0"),
    ("{schedule: cosine}", "weight.schedule = 'cosine': Input should be 'constant' or 'linear'"),
    ("{value: balanced, shares: 1}", "weight.shares = 1: unknown field; remove it or correct its name"),
))  # fmt: skip
def test_a_weight_that_is_none_is_refused_in_one_line(tmp_path, weight, told):
    text = "models: {m: {path: m}}\nlanguages: [zh]\nmethods: [{name: own, stages: [{supervisions: [{stage: lc, kind: logits, layer: i, weight: WEIGHT}]}]}]\n"
    file = tmp_path / "weighed.yaml"
    file.write_text(text.replace("WEIGHT", weight), encoding="utf-8")
    with pytest.raises(ParamsError) as error:
        load_study(file)
    assert str(error.value).endswith(told) and "\n" not in str(error.value)
    for fine, value in {"1e-3": 0.001, "0": 0.0, "balanced": Weight(value="balanced"), "{value: 2, schedule: linear}": Weight(value=2.0, schedule="linear")}.items():
        file.write_text(text.replace("WEIGHT", fine), encoding="utf-8")
        assert load_study(file).methods[0].supervisions[0].weight == value
