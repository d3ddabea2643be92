"""A study of thousands of runs: its graph, and its results read into tables. Here a small one; in full with

python tests/test_scale.py 8 12 9 5 40     # models, languages, methods, seeds, items a benchmark and language

which prints what it took (the graph is to be planned within a minute, the results read within half a minute and a GB)."""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import yaml

from dsft.results import load_costs, load_inside, load_item_scores, load_results
from dsft.study import Study, load_study

ROOT = Path(__file__).parents[1]
LANGUAGES = "vi ar zh th hi ru el de fr ko ja id".split()
METHODS = ["tft", "tft_en", "lc_logits", "lc_feature", "et_logits", "et_feature", "dsft_logits", "dsft_feature", "sdrrl"]
BENCHMARKS = {"xquad": "f1", "mlqa": "f1", "xnli": "acc", "xcopa": "acc"}


def large_study(folder: Path, models: int, languages: int, methods: int, seeds: int) -> Study:
    """A study of so many models, languages, methods and seeds, whose files lie in `folder`."""
    files = {lang: {"hub": "org/data", "name": lang} for lang in ("en", *LANGUAGES[:languages])}
    content = {"models": {f"m{n}": {"path": f"org/m{n}"} for n in range(models)}, "languages": LANGUAGES[:languages], "methods": METHODS[:methods]}
    content |= {"seeds": list(range(seeds)), "layers": {"i": 2, "j": 5}, "data": {"source": "files", "files": files}, "runs": str(folder / "runs")}
    content |= {"recipes": {"sdrrl": {"code_switch": 0.0, "translator": "org/t"}}, "evaluation": {"source": "hub", "benchmarks": list(BENCHMARKS)}}
    (folder / "large.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return load_study(folder / "large.yaml")


def write_runs(study: Study, items: int) -> None:
    """The folders of all runs as their evaluations leave them, with so many items a benchmark and language; half are right."""
    curve = [{"layer": layer, "quantity": quantity, "value": 0.5} for layer in range(33) for quantity in ("en", "tgt", "retrieval", "cosine_gap")]
    for run in study.all_runs():
        asked = [(name, lang) for name in BENCHMARKS for lang in (run.lang, "en")]
        scores = [{"dataset": name, "lang": lang, "prompt": "dsft", "metric": BENCHMARKS[name], "value": 50.0, "items": items, "chance": 25.0} for name, lang in asked]
        samples = [{"dataset": name, "lang": lang, "prompt": "dsft", "id": f"{name}-{n:05d}", "prediction": "so " * 9, "reference": "so", "value": n % 2} for name, lang in asked for n in range(items)]
        files = {"metrics.json": run.key | {"scores": scores}, "inside.json": run.key | {"rows": curve}, "provenance.json": {"model": {"steps": 9, "train_seconds": 1.5}}}
        run.folder.mkdir(parents=True)
        for name, content in files.items():
            (run.folder / name).write_text(json.dumps(content), encoding="utf-8")
        (run.folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")


def plan(study: Study) -> str:
    """What Snakemake says of a study that it is only to plan."""
    command = ["snakemake", "--profile", "params/profiles/local", "--config", f"study={study.file}", "--dry-run", "--cores", "2", "--quiet", "host", "rules"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout


def test_the_results_of_many_runs_are_read_whole(tmp_path):
    study = large_study(tmp_path, models=2, languages=2, methods=3, seeds=2)
    write_runs(study, items=10)
    items, results = load_item_scores(study), load_results(study)
    assert len(items) == 2 * 2 * 3 * 2 * len(BENCHMARKS) * 2 * 10 and len(results) == len(items) // 10
    means = items.groupby(["model", "target", "method", "seed", "dataset", "lang"], observed=True)["value"].mean()
    assert len(means) == len(results) and set(means) == {50.0}
    assert items[["model", "target", "dataset", "lang", "metric", "stem", "role"]].dtypes.map(lambda kind: isinstance(kind, pd.CategoricalDtype)).all()
    assert items.memory_usage(deep=True).sum() < 120 * len(items)  # bytes a row
    assert len(load_costs(study)) == 2 * 2 * 3 * 2 and len(load_inside(study)) == 2 * 2 * 3 * 2 * 4 * 33


def test_every_run_is_planned_once(tmp_path):
    planned = plan(large_study(tmp_path, models=2, languages=2, methods=9, seeds=2))
    counts = dict(re.findall(r"^(\w+) +(\d+)$", planned, re.MULTILINE))
    assert (counts["select_layers"], counts["recipe_rows"], counts["train"], counts["evaluate"]) == ("4", "8", "72", "72")
    assert counts["table1"] == counts["claims"] == "1"


if __name__ == "__main__":
    *sizes, items = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as scratch:
        study, started = large_study(Path(scratch), *sizes), time.time()
        plan(study)
        print(f"{len(study.all_runs()):,} runs planned in {time.time() - started:.0f} s")
        write_runs(study, items)
        for load in (load_results, load_item_scores, load_costs, load_inside):
            started, rows = time.time(), len(load(study))
            print(f"{load.__name__}: {rows:,} rows in {time.time() - started:.1f} s, at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB so far")
