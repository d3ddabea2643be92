"""What the graph of a study counts as a change: contents, not times; what a new recipe takes, what a failed job leaves, a rehearsal. In a copy of the project,
which may be changed, in a folder with a name that no shell and no pattern likes."""

import json
import os
import re
import shlex
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


def run(project: Path, *command: str, code: int = 0, **variables: str) -> str:
    """What a command says in the project, with the project's own library; it must end with this exit code."""
    outside = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    env = outside | {"PYTHONPATH": str(project), "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"} | variables
    result = subprocess.run(command, cwd=project, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == code, result.stdout[-4000:]
    return result.stdout


def snakemake(project: Path, *arguments: str) -> str:
    targets = [f"runs/toy/micro-llama/zh/{method}/seed0/train_log.jsonl" for method in ("tft", "toyed")]
    return run(project, "snakemake", "--profile", "params/profiles/local", "--config", "study=toy", "--cores", "2", *arguments, "--", *targets)


def planned(project: Path) -> set[str]:
    """The methods whose training would be done again."""
    return set(re.findall(r"output: runs/toy/micro-llama/zh/(\w+)/seed0/model", snakemake(project, "--dry-run")))


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with a recipe more - one notebook and one line of the table - and a study in files that uses it, trained."""
    project = tmp_path_factory.mktemp("project") / "it's [ä] $(touch here); *"
    project.mkdir()
    tracked = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in tracked.splitlines():
        if name.split("/")[0] in ("Makefile", "Snakefile", "settings.ini", "constraints.txt", "setup.py", "dsft", "models", "nbs", "params") and (ROOT / name).is_file():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, project / name)
    (project / ".venv").mkdir()
    (project / ".venv" / "installed").touch()

    cells = [nbformat.v4.new_markdown_cell("# toy\n\n> A recipe that says the English answer several times"), *map(nbformat.v4.new_code_cell, TOY)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), project / "nbs" / "recipes" / "toy.ipynb")
    table = project / "nbs" / "10_study.ipynb"
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


def test_a_study_goes_on_where_its_packed_runs_stop(project):
    """Evaluations come from archives, so nothing of them is made again, though no model is there; what was not packed is planned from its training on."""
    study = yaml.safe_load((project / "params" / "toy.yaml").read_text(encoding="utf-8"))
    study = study | {"methods": ["base", "tft", "dsft_logits"], "evaluation": {"benchmarks": ["xquad"]}}
    (project / "params" / "moved.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    runs = project / "runs" / "moved"
    where = {method: runs / "micro-llama" / "zh" / method / "seed0" for method in ("base", "tft", "dsft_logits")}
    for method in ("base", "dsft_logits"):
        (where[method] / "model").mkdir(parents=True)
        for name in ("metrics.json", "samples.jsonl", "inside.json", "pooled.safetensors", "provenance.json", "params.yaml", "train_log.jsonl", "data_report.json", "model/config.json"):
            (where[method] / name).write_text("{}\n", encoding="utf-8")
    for name in ("layers.json", "layers_provenance.json"):
        (where["base"].parents[1] / name).write_text("{}\n", encoding="utf-8")

    assert "2 runs of study moved packed" in run(project, "make", "pack", "STUDY=moved")
    shutil.rmtree(runs)
    assert "2 runs of study moved put back, 2 of 3 are there" in run(project, "make", "unpack", "STUDY=moved")
    assert not (where["dsft_logits"] / "model").exists()
    targets = [str((folder / "metrics.json").relative_to(project)) for folder in where.values()]
    plan = run(project, "snakemake", "--profile", "params/profiles/local", "--config", "study=moved", "--cores", "2", "--dry-run", "--", *targets)
    assert set(re.findall(r"^rule (\w+):|^Job \d+: ", plan, re.M)) - {""} == {"train", "evaluate"}
    assert set(re.findall(r"output: runs/moved/micro-llama/zh/(\w+)/", plan)) == {"tft"}


def test_the_bases_that_a_study_pretrains_are_made_by_themselves_and_before_runs_are_put_back(project):
    study = yaml.safe_load((project / "params" / "toy.yaml").read_text(encoding="utf-8"))
    small = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 600, "tokens": 4_000, "row_length": 64, "batch_size": 4}
    study = study | {"models": {f"small-{seed}": {"pretrain": {**small, "seed": seed}} for seed in (0, 1)}, "methods": ["base"], "recipes": {}, "layers": {"i": 1, "j": 2}, "evaluation": {"items": 4}}
    (project / "params" / "grown.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    weights = lambda: {file.parts[-3]: file.read_bytes() for file in sorted((project / "runs" / "grown").rglob("model.safetensors"))}

    run(project, "make", "bases", "STUDY=grown", "CORES=2")
    made = weights()
    assert list(made) == ["small-0", "small-1"] and made["small-0"] != made["small-1"]
    assert not [*(project / "runs" / "grown").rglob("metrics.json")]

    graph = ["snakemake", "--profile", "params/profiles/local", "--config", "study=grown", "--cores", "2"]
    evaluated = [f"runs/grown/small-{seed}/zh/base/seed0/metrics.json" for seed in (0, 1)]
    steps = lambda plan: re.findall(r"^rule (\w+):", plan, re.M)
    assert not [step for step in steps(run(project, *graph, "--dry-run", "--", *evaluated)) if step.startswith("pretrain")]
    run(project, *graph, "--", evaluated[0])
    assert "1 runs of study grown packed" in run(project, "make", "pack", "STUDY=grown")
    shutil.rmtree(project / "runs" / "grown")
    assert "1 runs of study grown put back, 1 of 2 are there" in run(project, "make", "unpack", "STUDY=grown", "CORES=2")  # the base of what is all packed is not needed
    assert weights() == {"small-1": made["small-1"]}
    assert steps(run(project, *graph, "--dry-run", "--", *evaluated)) == ["evaluate"]

    (project / evaluated[0]).unlink()
    shutil.copytree(project / "runs" / "grown" / "small-1" / "base", project / "runs" / "grown" / "small-0" / "base")  # as if another processor had made other weights
    told = run(project, "make", "unpack", "STUDY=grown", "CORES=2")
    assert "1 runs stay packed: they were made on another base model than is there" in told and "0 runs of study grown put back, 0 of 2 are there" in told


def test_a_base_whose_vocabulary_is_cut_is_made_from_the_texts_of_the_study(project):
    study = yaml.safe_load((project / "params" / "toy.yaml").read_text(encoding="utf-8"))
    study = study | {"models": {"micro-llama": {"path": "models/micro-llama", "vocabulary": {"min_count": 1}}}, "methods": ["tft"]}
    study["recipes"] = {}
    (project / "params" / "cut.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    target = "runs/cut/micro-llama/zh/tft/seed0/train_log.jsonl"
    make = lambda *arguments: run(project, "snakemake", "--config", "study=cut", "--nolock", "--cores", "2", *arguments, "--", target)
    cut_again = lambda: "rule cut_vocabulary_1" in make("--dry-run")

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


def test_a_cut_base_is_made_by_hand_as_by_the_graph(project):
    """What a notebook or `make unpack` finds missing, it makes; its lock is not the one that the notebook of the cut takes."""
    (project / "params" / "byhand.yaml").write_text((project / "params" / "cut.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    run(project, "python", "-c", "from dsft.study import load_study; load_study('byhand').run('micro-llama', 'zh', 'tft', 0).require_base()")
    made = [(project / "runs" / name / "micro-llama" / "cut" / "model.safetensors").read_bytes() for name in ("cut", "byhand")]
    assert made[0] == made[1]


def test_a_failed_training_is_told_last_and_keeps_nothing_else_from_being_made(project):
    study = yaml.safe_load((project / "params" / "toy.yaml").read_text(encoding="utf-8"))
    study |= {"methods": ["base", "tft"], "recipes": {}, "evaluation": {"items": 4, "benchmarks": ["xcopa"]}, "layers": {"i": 2, "j": 5}}
    study["data"]["max_length"] = 2
    file = project / "params" / "my study.yaml"
    file.write_text(yaml.safe_dump(study), encoding="utf-8")
    told = run(project, "make", "study", "STUDY=params/my study.yaml", "CORES=2", code=2)
    *_, where, error, which, make = told.strip().splitlines()
    assert (where, which) == ("train failed in cell 4", "  runs/my study/micro-llama/zh/tft/seed0/train.ipynb")
    assert told.count("\n".join((where, error, which))) == 2  # when it failed and at the end
    assert re.search(r"^\d+ of \d+ steps, 1 failed in ", told, re.MULTILINE) and "%|" not in told  # no bars
    assert error == "  ParamsError: data.max_length = 2: every prompt is longer than that; raise it" and make.startswith("make: ")
    assert (project / "runs/my study/micro-llama/zh/base/seed0/metrics.json").exists() and (project / "runs/my study/micro-llama/zh/layers.json").exists()


def test_a_study_of_the_paper_is_rehearsed_to_its_last_table(project):
    study = {"extends": "llama2-7b", "languages": ["zh"], "methods": ["base", "tft"], "sweeps": [{"methods": ["et_logits", "et_logits_at5"]}]}
    study |= {"evaluation": {"benchmarks": ["xquad", "flores"]}}
    (project / "params" / "paper.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    told = run(project, "make", "rehearse", "STUDY=paper", "CORES=2")
    assert "models.llama-2-7b: random and narrow in place of meta-llama/Llama-2-7b-hf: llama of 32 layers" in told
    assert "study paper: 4 of 4 runs finished, in runs/rehearsal/paper" in told
    figures = project / "runs" / "rehearsal" / "figures" / "paper"
    assert not (project / "figures" / "paper").exists()
    assert "XQuAD F1, zh" in (figures / "table1.md").read_text(encoding="utf-8") and "COMET, en-zh" in (figures / "table4.md").read_text(encoding="utf-8")
    assert "ET-logits: best at layer 5" in (figures / "figure3.md").read_text(encoding="utf-8") and (figures / "figure3.svg").exists()
    assert (figures / "claims.md").exists() and (figures / "table1_harness.csv").exists()


def test_no_name_and_no_path_is_run(project):
    assert not list(project.rglob("here")) and not list(project.parent.glob("here"))


@pytest.mark.parametrize("study", ["micro", "/some dir/it's [x].yaml", "a; touch x", "007", "[a]: #b", '"x" $$HOME `ls` \\'])
def test_make_passes_the_study_on_as_one_word(study):
    planned = subprocess.run(["make", "--dry-run", "--always-make", "study", f"STUDY={study}"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    commands = [shlex.split(line.replace("||", " ; ")) for line in planned.splitlines() if "dsft_" in line]
    study = study.replace("$$", "$")  # as make reads it
    assert [command[1] for command in commands if command[0].startswith("dsft_")] == [study, study]
    snakemake = next(command for command in commands if command[0] == "snakemake")
    assert yaml.load(snakemake[snakemake.index("--config") + 1].removeprefix("study="), yaml.BaseLoader) == study
    assert snakemake[-2:] == ["dsft_failures", study]


def test_the_paper_is_planned_for_slurm():
    pytest.importorskip("snakemake_executor_plugin_slurm")
    planned = subprocess.run(
        ["snakemake", "--profile", "params/profiles/slurm", "--config", "study=llama2-7b", "--dry-run", "--quiet", "host"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    jobs = re.findall(r"^rule (\w+):(.*?)(?=^\[|^rule |\Z)", planned.stdout, re.MULTILINE | re.DOTALL)
    asked = {name: re.search(r"resources: (.*)", text)[1] for name, text in jobs if "resources" in text}
    assert "mem_mb=256000" in asked["train"] and "runtime=2880" in asked["train"] and "gpu=8" in asked["train"]
    assert "gpu=1" in asked["evaluate"] and "mem_mb=8000" in asked["table1"] and "gpu" not in asked["table1"]
    assert sum(name == "train" for name, _ in jobs) == 29  # Tables 1 and 2, 3 and 4, Figure 3


def test_every_profile_is_yaml_that_says_where_jobs_run():
    executors = {file.parent.name: yaml.safe_load(file.read_text(encoding="utf-8")).get("executor") for file in (ROOT / "params" / "profiles").glob("*/*.yaml")}
    assert executors == {"local": None, "slurm": "slurm", "kubernetes": "kubernetes"}
