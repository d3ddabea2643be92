"""What the graph of a study counts as a change: contents, not times; and what a new recipe takes. In a copy of the project, which may be changed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from dsft.microcosm import World

ROOT = Path(__file__).parents[1]
TOY = [
    "#| default_exp recipes.toy",
    """#| export
from dsft.methods import Part
from dsft.study import Recipe, Run
from dsft.data import parallel_pairs""",
    """#| export
class ToyOptions(Part):
    \"\"\"How often a word is said.\"\"\"

    times: int = 2


def _rows(run: Run, options: ToyOptions):
    pairs, _ = parallel_pairs(run.study.data, run.lang, run.seed)
    said = [(pair, " ".join([pair.english["output"]] * options.times)) for pair in pairs]
    return [{"id": pair.id, "x_tgt": "say\\n", "y_tgt": text, "x_en": "say\\n", "y_en": text} for pair, text in said], {"rows": len(said)}


RECIPE = Recipe(options=ToyOptions, rows=_rows, check=lambda run, options: None)""",
]


def run(project: Path, *command: str) -> str:
    """What a command says in the project, with the project's own library."""
    outside = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    env = outside | {"PYTHONPATH": str(project), "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    result = subprocess.run(command, cwd=project, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


def snakemake(project: Path, *arguments: str) -> str:
    targets = [f"runs/toy/micro-llama/zh/{method}/seed0/train_log.jsonl" for method in ("tft", "toyed")]
    return run(project, "snakemake", "--config", "study=toy", "--nolock", "--cores", "2", *arguments, "--", *targets)


def planned(project: Path) -> set[str]:
    """The methods whose training would be done again."""
    return set(re.findall(r"output: runs/toy/micro-llama/zh/(\w+)/seed0/model", snakemake(project, "--dry-run")))


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with a recipe more - one notebook and one line of the table - and a study in files that uses it, trained."""
    project = tmp_path_factory.mktemp("project")
    tracked = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in tracked.splitlines():
        if name.split("/")[0] in ("Snakefile", "settings.ini", "dsft", "models", "nbs", "params") and (ROOT / name).is_file():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, project / name)

    cells = [nbformat.v4.new_markdown_cell("# toy\n\n> A recipe that says the English answer several times"), *map(nbformat.v4.new_code_cell, TOY)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), project / "nbs" / "recipes" / "toy.ipynb")
    table = project / "nbs" / "20_training.ipynb"
    line = '    \\"sdrrl\\": \\"dsft.recipes.sdrrl\\",\\n'
    assert table.read_text(encoding="utf-8").count(line) == 1
    table.write_text(table.read_text(encoding="utf-8").replace(line, line + '",\n    "' + line.replace("sdrrl", "toy")), encoding="utf-8")
    run(project, "nbdev_export")

    for lang in ("en", "zh"):
        items = [{"instruction": item[lang]["query"], "input": "", "output": item[lang]["answer"]} for item in World().instructions(24)]
        (project / f"{lang}.json").write_text(json.dumps(items, ensure_ascii=False), encoding="utf-8")
    study = {
        "models": {"micro-llama": {"path": "models/micro-llama"}},
        "languages": ["zh"],
        "methods": ["tft", {"name": "toyed", "stages": [{"rows": ["tgt", {"recipe": "toy"}]}]}],
        "data": {"source": "files", "files": {"en": "en.json", "zh": "zh.json"}},
        "train": {"batch_size": 8, "per_device_batch_size": 8, "max_steps": 2, "logging_steps": 1, "bf16": False},
        "recipes": {"toy": {"times": 3}},
    }
    (project / "params" / "toy.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    snakemake(project, "--quiet", "rules", "host")
    return project


def test_a_recipe_is_one_notebook_and_one_line(project):
    folder = project / "runs" / "toy" / "micro-llama" / "zh" / "toyed" / "seed0"
    made = [json.loads(line) for line in (folder / "recipe_rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(made) == 24 and all(row["recipe"] == "toy" and row["y_tgt"].count(row["y_tgt"].split(" ")[0]) >= 3 for row in made)
    report = json.loads((folder / "data_report.json").read_text(encoding="utf-8"))
    assert report["tokens"]["examples"] == 48 and report["toy"]["examples"] == 24


def test_what_is_touched_is_not_trained_again(project):
    for name in ("zh.json", "models/micro-llama/model.safetensors", "nbs/experiments/train.ipynb", "dsft/losses.py", "dsft/recipes/toy.py", "params/toy.yaml"):
        os.utime(project / name)
    assert planned(project) == set()


@pytest.mark.parametrize(
    ("name", "before", "after", "again"),
    [
        ("zh.json", "？", "？？", {"tft", "toyed"}),
        ("models/micro-llama/config.json", '"use_cache": false', '"use_cache": true', {"tft", "toyed"}),
        ("dsft/losses.py", "import logging", "import logging\nlogging", {"tft", "toyed"}),
        ("dsft/recipes/toy.py", "* options.times", "* (options.times + 0)", {"toyed"}),
        ("dsft/recipes/toy.py", "class ToyOptions", "# the options\nclass ToyOptions", set()),
        ("dsft/recipes/sdrrl.py", "class SDRRLOptions", "OTHER = 1\nclass SDRRLOptions", set()),
        ("dsft/report.py", "import os", "import os\nOTHER = 1", set()),
        ("params/toy.yaml", "times: 3", "times: 2", {"toyed"}),
    ],
)
def test_what_is_edited_is_trained_again_with_what_depends_on_it(project, name, before, after, again):
    file = project / name
    content, times = file.read_text(encoding="utf-8"), (file.stat().st_atime, file.stat().st_mtime)
    assert before in content
    file.write_text(content.replace(before, after, 1), encoding="utf-8")
    os.utime(file, (0, 0))  # even if it looks older than all that was made of it
    try:
        assert planned(project) == again
    finally:
        file.write_text(content, encoding="utf-8")
        os.utime(file, times)


def test_what_is_as_it_was_is_not_trained_again(project):
    assert planned(project) == set()


def test_a_base_whose_vocabulary_is_cut_is_made_from_the_texts_of_the_study(project):
    study = yaml.safe_load((project / "params" / "toy.yaml").read_text(encoding="utf-8"))
    study = study | {"models": {"micro-llama": {"path": "models/micro-llama", "vocabulary": {"min_count": 1}}}, "methods": ["tft"]}
    study["recipes"] = {}
    (project / "params" / "cut.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    target = "runs/cut/micro-llama/zh/tft/seed0/train_log.jsonl"
    make = lambda *arguments: run(project, "snakemake", "--config", "study=cut", "--nolock", "--cores", "2", *arguments, "--", target)
    cut_again = lambda: "rule cut_vocabulary_micro-llama" in make("--dry-run")

    make("--quiet", "rules", "host")
    base, trained = project / "runs" / "cut" / "micro-llama" / "cut", project / Path(target).parent / "model"
    sizes = [json.loads((folder / "config.json").read_text())["vocab_size"] for folder in (base, trained, project / "models" / "micro-llama")]
    assert sizes[0] == sizes[1] < sizes[2]
    assert json.loads((base / "provenance.json").read_text())["segmented differently"] == 0
    os.utime(project / "zh.json")
    assert not cut_again()
    content = (project / "zh.json").read_text(encoding="utf-8")
    (project / "zh.json").write_text(content.replace("？", "？？", 1), encoding="utf-8")
    try:
        assert cut_again()
    finally:
        (project / "zh.json").write_text(content, encoding="utf-8")
    weights = project / "models" / "micro-llama" / "config.json"
    content, times = weights.read_text(encoding="utf-8"), (weights.stat().st_atime, weights.stat().st_mtime)
    weights.write_text(content.replace('"use_cache": false', '"use_cache": true'), encoding="utf-8")
    try:
        assert cut_again()
    finally:
        weights.write_text(content, encoding="utf-8")
        os.utime(weights, times)
