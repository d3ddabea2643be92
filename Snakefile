"""The graph of a study: which notebook makes which file.

    base model -> critical layers -> one training a model, language, method and seed -> its evaluation -> tables and figures
                  (or the method's own training mix)

Run it with `make study`, look at it with `make study-plan`; on a cluster add a Snakemake profile, for example
`snakemake --config study=llama2-7b --executor slurm --jobs 24`.
"""

import fcntl
import os
import re
import sys
from pathlib import Path

from dsft.methods import VARIANTS
from dsft.study import load_study

STUDY = config.get("study", "micro")
study = load_study(STUDY)
folder = os.path.relpath(study.folder())
figures = os.path.relpath(study.figures_folder())
runs = {(r.model, r.lang, r.method.name, str(r.seed)): r for r in study.all_runs()}
trainings = {(r.model, r.training_lang, r.method.name, str(r.seed)): r for r in study.all_runs()}
RUN = f"{folder}/{{model}}/{{lang}}/{{method}}/seed{{seed}}"

# What each analysis notebook writes to figures/<study>/.
ANALYSES = {
    "figure1": ["figure1.png", "figure1.svg"],
    "figure2": ["figure2.png", "figure2.svg", "entropy.csv", "entropy_tokens.csv"],
    "table1": ["table1.csv", "table1.md", "table1_against_tft.csv", "table1_against_tft.md", "results.csv", "items.parquet", "provenance.json"],
    "table2": ["table2.csv", "table2.md", "table2_against_tft.csv", "table2_against_tft.md"],
    "table3": ["table3.csv", "table3.md", "table3_against_tft.csv", "table3_against_tft.md"],
    "table4": ["table4.csv", "table4.md", "table4_against_tft.csv", "table4_against_tft.md"],
    "retention": ["retention.csv", "retention.md", "retention.png", "retention.svg"],
    "figure3": ["figure3.csv", "figure3.md", "figure3.png", "figure3.svg", "figure3_against_tft.csv", "figure3_against_tft.md"],
    "figure4": ["figure4.png", "figure4.svg", "figure4_counted.png", "figure4_counted.svg"],
    "inside": ["inside.csv", "inside.png", "inside.svg"],
    "layers": ["layers.csv", "layers.md", "layers.png", "layers.svg", "layers_against_rule.csv", "layers_against_rule.md"],
    "readings": ["readings.csv", "readings.md"],
    "cost": ["costs.csv", "cost.csv", "cost.md", "cost.png", "cost.svg"],
    "data_size": ["data_size.csv", "data_size.md", "data_size.png", "data_size.svg", "data_size_against_tft.csv", "data_size_against_tft.md"],
    "dial": ["dial.csv", "dial.md", "dial.png", "dial.svg"],
    "claims": ["claims.csv", "claims.md", "claims.png", "claims.svg"],
}

# Some of them need runs that not every study has: methods of that name, or a benchmark.
NEEDS = {
    "table3": r"(lc|et)_(logits|feature)",
    "figure3": r"et_(logits|feature)_at\d+",
    "layers": r"dsft_(logits|feature)_at\d+_\d+",
    "readings": rf"dsft_\w+_({'|'.join(VARIANTS)})",
    "data_size": r"\w+_n\d+",
    "cost": r"tft",
}
ANALYSES = {name: files for name, files in ANALYSES.items() if any(re.fullmatch(NEEDS.get(name, ".*"), m) for m in study.every_method)}
if "flores" not in study.evaluation.benchmarks:
    del ANALYSES["table4"]
if not study.dial:
    del ANALYSES["dial"]

# One study at a time: the lock goes when the process goes, however it dies (Snakemake's own lock stays behind a kill).
if workflow.is_main_process and not workflow.dryrun:
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = open(f"{folder}/.lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"dsft: study {study.name} is already running (it holds {folder}/.lock); wait for it or stop it")


wildcard_constraints:
    model="|".join(study.models),
    lang="|".join(["en", *study.languages]),
    method="|".join(study.every_method),
    seed=r"\d+",


def notebook(name, **parameters):
    """The command that executes a notebook; its executed copy is the rule's log, its progress bars go to the terminal."""
    given = "".join(f" -r {key} {value}" for key, value in parameters.items())
    return f"OMP_NUM_THREADS={{threads}} papermill {{input.notebook}} {{log}} --no-progress-bar --stderr-file /dev/stderr{given}"


SEED = " -p seed {wildcards.seed}"
TRAIN = notebook("train", study=STUDY, model="{wildcards.model}", lang="{params.lang}", method="{wildcards.method}") + SEED
if study.train.launch:  # on several processes: the same training without its notebook
    TRAIN = (
        f"set -o pipefail; accelerate launch --config_file {study.train.launch} -m dsft.training {STUDY} --model {{wildcards.model}}"
        " --lang {params.lang} --method {wildcards.method} --seed {wildcards.seed} 2>&1 | tee {log}"
    )


def library(*modules):
    """The modules whose change makes a result stale."""
    return [f"dsft/{module}.py" for module in modules]


def base_folder(model):
    """The base model as an input: its folder, or nothing when it comes from the hub."""
    base = Path(study.base(model))
    return [os.path.relpath(base)] if study.models[model].pretrain or base.exists() else []


def trained(w):
    """The model that a run evaluates."""
    run = runs[tuple(w)]
    return [os.path.relpath(run.trained)] if run.method.trains_on else base_folder(w.model)


def benchmark_files():
    """The files of the benchmarks, where the study takes them from a folder."""
    names = study.evaluation.benchmarks if study.evaluation.data_dir else ()
    return sorted(str(p) for name in names for p in (Path(study.evaluation.data_dir) / name).glob("*") if p.is_file())


def layers(w):
    """The file of the critical layers, for a method that supervises any."""
    run = trainings[tuple(w)]
    return [os.path.relpath(run.layers_file)] if run.method.supervisions else []


def mix(w):
    """The file of the examples that a method makes for itself."""
    run = trainings[tuple(w)]
    return [os.path.relpath(run.mix_file)] if run.mix_file else []


rule all:
    input:
        [f"{figures}/{name}" for names in ANALYSES.values() for name in names],


for name, model in study.models.items():
    if model.pretrain:

        rule:
            name:
                f"pretrain_{name}"
            input:
                notebook=ancient("nbs/experiments/pretrain.ipynb"),
            output:
                directory(os.path.relpath(study.base(name))),
            log:
                f"{folder}/{name}/pretrain.ipynb",
            params:
                model=name,
                spec=model.pretrain.model_dump(mode="json"),
            shell:
                notebook("pretrain", study=STUDY, model="{params.model}")


rule select_layers:
    input:
        base=lambda w: base_folder(w.model),
        notebook="nbs/experiments/select_layers.ipynb",
        code=library("prompts", "phrasebook", "microcosm", "tables", "data", "backbone", "selection"),
    output:
        f"{folder}/{{model}}/{{lang}}/layers.json",
    log:
        f"{folder}/{{model}}/{{lang}}/select_layers.ipynb",
    params:
        spec=study.model_dump(mode="json", include={"layers", "data"}),
    shell:
        notebook("select_layers", study=STUDY, model="{wildcards.model}", lang="{wildcards.lang}")


rule distill:
    input:
        base=lambda w: base_folder(w.model),
        notebook="nbs/experiments/distill.ipynb",
        code=library("prompts", "phrasebook", "microcosm", "data", "recipes/sdrrl"),
    output:
        f"{RUN}/sdrrl.jsonl",
        f"{RUN}/sdrrl_report.json",
    log:
        f"{RUN}/distill.ipynb",
    params:
        spec=study.model_dump(mode="json", include={"data", "sdrrl"}),
    shell:
        notebook("distill", study=STUDY, model="{wildcards.model}", lang="{wildcards.lang}", method="{wildcards.method}") + SEED


rule train:
    input:
        base=lambda w: base_folder(w.model),
        layers=layers,
        mix=mix,
        notebook="nbs/experiments/train.ipynb",
        code=library("methods", "prompts", "phrasebook", "microcosm", "data", "backbone", "losses", "trainer", "training"),
    output:
        directory(f"{RUN}/model"),
        f"{RUN}/train_log.jsonl",
    log:
        f"{RUN}/train.{'log' if study.train.launch else 'ipynb'}",
    params:
        spec=lambda w: trainings[tuple(w)].inputs,
        lang=lambda w: trainings[tuple(w)].lang,
    shell:
        TRAIN


rule evaluate:
    input:
        model=trained,
        notebook="nbs/experiments/evaluate.ipynb",
        code=library("prompts", "phrasebook", "microcosm", "backbone", "selection", "metrics", "benchmark_items", "tasks", "inside"),
        tasks=sorted(str(p) for p in Path("dsft/benchmarks").glob("*.yaml")),
        data=benchmark_files(),
    output:
        f"{RUN}/metrics.json",
        f"{RUN}/samples.jsonl",
        f"{RUN}/inside.json",
        f"{RUN}/provenance.json",
    log:
        f"{RUN}/evaluate.ipynb",
    params:
        spec=study.evaluation.model_dump(mode="json"),
    shell:
        notebook("evaluate", study=STUDY, model="{wildcards.model}", lang="{wildcards.lang}", method="{wildcards.method}") + SEED


for name, outputs in ANALYSES.items():

    rule:
        name:
            name
        input:
            metrics=[os.path.relpath(r.folder / "metrics.json") for r in study.all_runs()],
            layers=[os.path.relpath(f) for f in sorted({r.layers_file for r in study.all_runs()})],
            notebook=f"nbs/analysis/{name}.ipynb",
            code=library("results", "statistics", "report"),
        output:
            [f"{figures}/{output}" for output in outputs],
        log:
            f"{folder}/analysis/{name}.ipynb",
        shell:
            notebook(name, study=STUDY)
