"""The graph of a study: which notebook makes which file.

    base model -> critical layers -> one training a model, language, method and seed -> its evaluation -> tables and figures
                  (or rows that a recipe makes, or the model that another method trained)

What the graph makes, Snakemake tracks by time and checksum. What it finds - notebooks, the library, data, a base model - counts by
content: a digest among the parameters of the rule. Editing such a file makes again what depends on it, touching it does not.

Run it with `make study`, look at it with `make study-plan`; `PROFILE=slurm` and the like run it on a cluster (params/profiles/). Whatever a study file or a
path may hold - spaces, quotes, signs - reaches a shell quoted (`:q`) and a pattern escaped.
"""

import fcntl
import os
import re
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import yaml

from dsft.files import ParamsError, by_content, contents, digest, located, made_by, writing
from dsft.kernels import start_server
from dsft.methods import Ask
from dsft.metrics import INSTRUCTIONS
from dsft.progress import watch
from dsft.study import load_study

STUDY = str(config.get("study", "micro"))
study = load_study(STUDY)
methods = study.every_method.values()
folder = os.path.relpath(study.folder())
figures = os.path.relpath(study.figures_folder())
runs = {(r.model, r.lang, r.method.name, str(r.seed)): r for r in study.all_runs()}
trainings = {(r.model, r.training_lang, r.method.name, str(r.seed)): r for r in study.all_trainings()}
selections = {(r.model, r.selected_rows.parts[-4], r.method.name, str(r.seed)): r for r in reversed(study.all_trainings()) if r.method.selects}
RUN = f"{folder}/{{model}}/{{lang}}/{{method}}/seed{{seed}}"
BASE = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md", "SHA256SUMS"]  # of a base that the graph makes
EVALUATION = ["metrics.json", "samples.jsonl", "inside.json", "pooled.safetensors", "provenance.json", "params.yaml"]


def of_both(*stems):
    """The csv and the Markdown file of tables."""
    return [f"{stem}.{kind}" for stem in stems for kind in ("csv", "md")]


def picture(*stems):
    """The two files of figures."""
    return [f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")]


# What each analysis notebook writes to figures/<study>/.
ANALYSES = {
    "figure1": picture("figure1"),
    "figure2": [*picture("figure2"), "entropy.csv", "entropy_tokens.csv"],
    "table1": [*of_both("table1", "table1_against_tft"), "results.csv", "items.parquet", "provenance.json"],
    "table2": of_both("table2", "table2_against_tft"),
    "table3": of_both("table3", "table3_against_tft"),
    "table4": of_both("table4", "table4_against_tft"),
    "bits": of_both("bits", "bits_against_tft", "bits_english"),
    "retention": [*of_both("retention"), *picture("retention")],
    "figure3": [*of_both("figure3", "figure3_against_tft"), *picture("figure3")],
    "figure4": [*picture("figure4", "figure4_counted"), "figure4_tsne.csv"],
    "inside": ["inside.csv", *of_both("query_gap"), *picture("inside")],
    "layers": [*of_both("layers", "layers_against_rule"), *picture("layers")],
    "readings": of_both("readings"),
    "instructed": of_both("instructed"),
    "cost": ["costs.csv", *of_both("cost"), *picture("cost")],
    "data_size": [*of_both("data_size", "data_size_against_tft"), *picture("data_size")],
    "code_switch_sweep": [*of_both("code_switch_sweep"), *picture("code_switch_sweep")],
    "which_method": [*of_both("which_method"), *of_both("which_base"), *picture("which_method")],
    "learning_rates": of_both("learning_rates"),
    "weights": [*of_both("weights"), *picture("weights")],
    "endpoint": of_both("endpoint"),
    "claims": [*of_both("claims"), *picture("claims")],
    "replication": of_both("replication"),
}

for prompt in study.evaluation.prompt[1:]:  # the same models, asked in another way
    ANALYSES["table1"].append(f"results_{prompt}.csv")
    for table in ("table1", "table2", "table3", "table4"):
        ANALYSES[table].append(f"{table}_{prompt}.csv")

# Some of them need runs that not every study has.
plain = [m for m in methods if not m.variant and m.items is None]  # at most its layers differ from the method it is a variation of
ablation = any(m.role == "ours" and m.stem == m.name and len({s.stage for s in m.supervisions}) == 1 for m in methods)
sizes = {(m.stem, m.items or study.data.items) for m in methods if not m.variant and not m.layers and (m.items or study.data.items)}
POSSIBLE = {
    "table3": ablation,
    "table4": ablation and "flores" in study.evaluation.benchmarks,
    "figure3": "tft" in study.every_method and any(m.layers and [s.stage for s in m.supervisions] == ["et"] for m in plain),
    "layers": "tft" in study.every_method and any(m.layers and [s.stage for s in m.supervisions] == ["lc", "et"] for m in plain),
    "readings": any(m.variant and not m.layers and m.items is None for m in methods),
    "data_size": len(sizes) > len({stem for stem, _ in sizes}),
    "cost": "tft" in study.every_method,
    "code_switch_sweep": study.swept_knob is not None,
    "which_method": sum(m.role == "comparator" for m in methods) > 3,  # more than the paper compares with
    "learning_rates": bool(study.learning_rates),
    "weights": bool(study.learning_rates) and len({s.weight for m in methods if m.role == "ours" for s in m.supervisions}) > 1,
    "instructed": study.evaluation.source == "microcosm",
    "endpoint": study.evaluation.source != "microcosm" and {"tft", "tft_compute", "dsft_logits"} <= study.every_method.keys() and {"xquad", "mlqa"} <= set(study.evaluation.benchmarks),
}
ANALYSES = {name: written for name, written in ANALYSES.items() if POSSIBLE.get(name, True)}

# One study at a time: the lock goes when the process goes, however it dies (Snakemake's own lock stays behind a kill).
if workflow.is_main_process and not workflow.dryrun:
    try:
        with writing(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
            lock = open(f"{folder}/.lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ParamsError as error:
        sys.exit(f"dsft: {error}")
    except BlockingIOError:
        sys.exit(f"dsft: study {study.name} is already running (it holds {folder}/.lock); wait for it or stop it")
    watch(workflow)  # one line in the terminal; what the jobs write to theirs goes into files

os.environ.setdefault("TQDM_MININTERVAL", "1")  # seconds between two states of a bar in such a file


# The notebooks run in processes forked from one that has imported what they import; it lives as long as Snakemake.
WARM = ["dsft.selection", "dsft.tasks", "dsft.training", "dsft.report", "transformers.models.llama.modeling_llama", "transformers.models.gemma2.modeling_gemma2"]
servers = []


onstart:
    with suppress(OSError):  # without a server each notebook starts by itself
        servers.append(start_server(f"{folder}/.kernels", WARM))


wildcard_constraints:
    model="|".join(map(re.escape, study.models)),
    lang="|".join(map(re.escape, dict.fromkeys(["en", *study.languages, *(lang for _, lang, _, _ in trainings)]))),
    method="|".join(dict.fromkeys(r.method.name for r in [*runs.values(), *trainings.values()])),
    seed=r"\d+",


def notebook(*more, **parameters):
    """The command that executes a rule's notebook for the study; its logs are the executed copy and what it writes to its terminal.

    `parameters` name what Snakemake fills in, each quoted for the shell; `more` is more of the command.
    """
    given = " ".join([*(f"-r {key} {{{value}:q}}" for key, value in {"study": "STUDY", **parameters}.items()), *more])
    command = f"OMP_NUM_THREADS={{threads}} python -m dsft.kernels {{input.notebook}} {{log[0]:q}} --no-progress-bar --stderr-file /dev/stderr {given}"
    return f"set -o pipefail; {command} 2>&1 | cat > {{log[1]:q}}"


def logs(stem):
    """The two logs of a rule that executes a notebook."""
    return [f"{stem}.ipynb", f"{stem}.stderr"]


SEED = "-p seed {wildcards.seed}"
OF_A_RUN = dict(model="wildcards.model", lang="wildcards.lang", method="wildcards.method")
TRAIN = notebook(SEED, **OF_A_RUN | {"lang": "params.lang"})
if study.train.launch:  # on several processes: the same training without its notebook
    TRAIN = (
        "accelerate launch --config_file {study.train.launch:q} -m dsft.training {STUDY:q} --model={wildcards.model:q}"
        " --lang {params.lang:q} --method {wildcards.method:q} --seed {wildcards.seed} > {log:q} 2>&1"
    )


code = cache(made_by)  # what decides about a notebook's result besides its parameters


def found_base(model):
    """A base model that the study finds, by its content: a folder; a base that the graph makes is an input, one of the hub has its name."""
    return "" if study.models[model].made_by else cached_digest(study.base(model))


def found_source(model):
    """The model whose vocabulary is cut, in the same way."""
    return "" if study.models[model].made_by[:-1] else cached_digest(study.source(model))


cached_digest = cache(digest)


def found(paths):
    """Files that the study finds, by their content, wherever they lie."""
    return by_content({"files": contents(paths)})


def base_files(model):
    """The files of a base model that the graph makes."""
    return [os.path.relpath(Path(study.base(model)) / name) for name in BASE[:4]] if study.models[model].made_by else []


def bases_left(w):
    """The files of the base models that have a run which is neither there nor packed."""
    from dsft.archive import runs_left  # takes seconds, which nothing else here need wait for

    return [file for model in dict.fromkeys(run.model for run in runs_left(study)) for file in base_files(model)]


def start(w):
    """The models that a training starts from or adds up, where the graph makes them."""
    run = trainings[tuple(w)]
    bases = [w.model, *(needed.model for needed in run.needs.values())] if run.start is None else []
    return [*dict.fromkeys(file for model in bases for file in base_files(model)), *(os.path.relpath(needed.trained) for needed in run.needs.values())]


def trained(w):
    """The model that a run evaluates, where the graph makes it."""
    run = runs[tuple(w)]
    return [os.path.relpath(run.trained)] if run.method.made else base_files(w.model)


def benchmark_files(lang):
    """The files of what is asked: of the benchmarks, where the study takes them from a folder, and of the held-out instructions, where it asks for them."""
    names = study.evaluation.benchmarks if study.evaluation.data_dir else ()
    of_benchmarks = sorted(path for name in names for path in (located(study.evaluation.data_dir) / name).rglob("*") if path.is_file())
    return [*of_benchmarks, *(study.data_files(lang) if INSTRUCTIONS in study.evaluation.benchmarks else ())]


def texts_of_the_study():
    """What decides about the texts that the study's models read and are to say."""
    data, evaluation = {"source", "files", "join", "template"}, {"source", "data_dir", "splits", "benchmarks", "prompt"}
    parts = study.model_dump(mode="json", include={"languages": True, "data": data, "evaluation": evaluation})
    return parts, found(path for lang in study.languages for path in [*study.layer_files(lang), *benchmark_files(lang)])


BASE_STEPS = {  # notebook that makes a base model -> what it depends on besides the step before it
    "pretrain": lambda name: study.models[name].pretrain.model_dump(mode="json"),
    "dequantise": lambda name: found([located(study.models[name].gguf)]),
    "cut_vocabulary": lambda name: [study.models[name].vocabulary.model_dump(mode="json"), found_source(name), *texts_of_the_study()],
}


def layers(w):
    """The file of the critical layers, for a method that supervises any."""
    run = trainings[tuple(w)]
    return [os.path.relpath(run.layers_file)] if run.method.supervisions else []


def recipe_rows(w):
    """The rows that recipes make for a training."""
    run = trainings[tuple(w)]
    return [os.path.relpath(run.recipe_rows)] if run.method.recipes else []


def selected_rows(w):
    """The rows that are selected for a training."""
    run = trainings[tuple(w)]
    return [os.path.relpath(run.selected_rows)] if run.method.selects else []


@cache
def large(model):
    """Whether a base wants a GPU: one of the hub, or a gigabyte of weights and more."""
    base = Path(study.base(model))
    return not study.models[model].pretrain and (not base.is_dir() or sum(file.stat().st_size for file in base.glob("*.safetensors")) > 1e9)


def needs(small, big):
    """What the jobs of a rule ask of a cluster, (MB, minutes, GPUs), for a small base and for a large one; a profile may say otherwise (params/profiles/)."""
    return {name: lambda w, n=n: (big if large(w.model) else small)[n] or None for n, name in enumerate(("mem_mb", "runtime", "gpu"))}


launch = yaml.safe_load(Path(study.train.launch).read_text(encoding="utf-8")) if study.train.launch else {}
PROCESSES = launch.get("num_processes", 1) // launch.get("num_machines", 1)  # of a training, on one machine


RESULTS = [f"{folder}/{model}/{lang}/{method}/seed{seed}/{name}" for model, lang, method, seed in runs for name in EVALUATION]


localrules:
    all,
    bases,
    bases_left,
    results,


rule all:
    input:
        RESULTS,
        [f"{figures}/{name}" for names in ANALYSES.values() for name in names],


rule bases:
    input:
        [file for model in study.models for file in base_files(model)],


rule bases_left:  # before packed runs are put back
    input:
        bases_left,


for number, name in enumerate(study.models, 1):
    before = []
    for step, made in study.base_steps(name).items():

        rule:
            name:
                f"{step}_{number}"
            input:
                before=before,
                notebook=ancient(f"nbs/experiments/{step}.ipynb"),
            output:
                [os.path.relpath(Path(made) / file) for file in BASE],
            log:
                *logs(f"{folder}/{name}/{step}"),
            resources:
                mem_mb=8_000,
                runtime=240,
            params:
                model=name,
                spec=BASE_STEPS[step](name),
            shell:
                notebook(model="params.model")

        before = [os.path.relpath(Path(made) / file) for file in BASE[:4]]


rule select_layers:
    input:
        base=lambda w: base_files(w.model),
        notebook=ancient("nbs/experiments/select_layers.ipynb"),
    output:
        f"{folder}/{{model}}/{{lang}}/layers.json",
        f"{folder}/{{model}}/{{lang}}/layers_provenance.json",
    log:
        *logs(f"{folder}/{{model}}/{{lang}}/select_layers"),
    resources:
        **needs((4_000, 60, 0), (64_000, 240, 0)),
    params:
        spec=study.model_dump(mode="json", include={"layers": True, "data": True, "evaluation": {"source", "facts"}}),
        files=lambda w: found(study.layer_files(w.lang)),
        base=lambda w: found_base(w.model),
        code=code("nbs/experiments/select_layers.ipynb"),
    shell:
        notebook(model="wildcards.model", lang="wildcards.lang")


rule recipe_rows:
    input:
        base=lambda w: base_files(w.model),
        needed=lambda w: [os.path.relpath(needed.trained) for needed in trainings[tuple(w)].needs.values()],
        notebook=ancient("nbs/experiments/recipe_rows.ipynb"),
    output:
        f"{RUN}/recipe_rows.jsonl",
        f"{RUN}/recipe_rows_report.json",
    log:
        *logs(f"{RUN}/recipe_rows"),
    resources:
        **needs((4_000, 120, 0), (64_000, 1440, 1)),
    params:
        spec=lambda w: by_content({part: trainings[tuple(w)].inputs[part] for part in ("data", "recipes", "files")}),
        base=lambda w: found_base(w.model),
        code=lambda w: code("nbs/experiments/recipe_rows.ipynb", trainings[tuple(w)].method.recipes),
    shell:
        notebook(SEED, **OF_A_RUN)


rule select_rows:
    input:
        base=lambda w: base_files(w.model),
        notebook=ancient("nbs/experiments/select_rows.ipynb"),
    output:
        f"{RUN}/selected_rows.json",
    log:
        *logs(f"{RUN}/select_rows"),
    resources:
        **needs((4_000, 120, 0), (64_000, 1440, 1)),
    params:
        spec=lambda w: [selections[tuple(w)].inputs[part] for part in ("data", "training")] + [study.model_dump(mode="json", include={"evaluation"})],
        lang=lambda w: selections[tuple(w)].lang,
        files=lambda w: [by_content({"files": selections[tuple(w)].pool_files}), found(benchmark_files(selections[tuple(w)].lang))],
        base=lambda w: found_base(w.model),
        code=code("nbs/experiments/select_rows.ipynb"),
    shell:
        notebook(SEED, **OF_A_RUN | {"lang": "params.lang"})


added_up = sorted({run.method.name for run in trainings.values() if run.method.weights})

if added_up:

    rule combine:
        input:
            start=start,
            notebook=ancient("nbs/experiments/combine.ipynb"),
        output:
            directory(f"{RUN}/model"),
        log:
            *logs(f"{RUN}/combine"),
        wildcard_constraints:
            method="|".join(added_up),
        resources:
            **needs((4_000, 60, 0), (256_000, 240, 0)),
        params:
            spec=lambda w: by_content(trainings[tuple(w)].inputs),
            lang=lambda w: trainings[tuple(w)].lang,
            base=lambda w: [found_base(model) for model in (w.model, *(needed.model for needed in trainings[tuple(w)].needs.values()))],
            code=code("nbs/experiments/combine.ipynb"),
        shell:
            notebook(SEED, **OF_A_RUN | {"lang": "params.lang"})


rule train:
    input:
        start=start,
        layers=layers,
        rows=recipe_rows,
        selected=selected_rows,
        notebook=ancient("nbs/experiments/train.ipynb"),
    output:
        directory(f"{RUN}/model"),
        f"{RUN}/train_log.jsonl",
        f"{RUN}/data_report.json",
    log:
        *([f"{RUN}/train.log"] if study.train.launch else logs(f"{RUN}/train")),
    wildcard_constraints:
        method="|".join(dict.fromkeys(run.method.name for run in trainings.values() if run.method.stages)),
    threads: PROCESSES
    resources:
        **needs((4_000, 240, 0), (256_000, 2880, PROCESSES)),
    params:
        spec=lambda w: by_content(trainings[tuple(w)].inputs),
        lang=lambda w: trainings[tuple(w)].lang,
        base=lambda w: found_base(w.model),
        code=lambda w: code("nbs/experiments/train.ipynb", trainings[tuple(w)].method.recipes),
    shell:
        TRAIN


def asked(w):
    """What decides about how a run is asked, but for the model."""
    ask = runs[tuple(w)].method.ask
    of_data = INSTRUCTIONS in study.evaluation.benchmarks or ask.shots
    parts = study.model_dump(mode="json", include={"evaluation", *(["data"] if of_data else [])})
    return parts | ({} if ask == Ask() else {"ask": ask.model_dump(mode="json")})


rule evaluate:
    input:
        model=trained,
        layers=lambda w: [os.path.relpath(runs[tuple(w)].layers_file)] if study.supervises else [],  # where LC and ET are measured
        notebook=ancient("nbs/experiments/evaluate.ipynb"),
    output:
        [f"{RUN}/{name}" for name in EVALUATION],
    log:
        *logs(f"{RUN}/evaluate"),
    resources:
        **needs((4_000, 120, 0), (64_000, 1440, 1)),
    params:
        spec=asked,
        files=lambda w: found([*benchmark_files(w.lang), *study.evaluation.facts_files(w.lang)]),
        base=lambda w: "" if runs[tuple(w)].method.made else found_base(w.model),
        code=code("nbs/experiments/evaluate.ipynb"),
    shell:
        notebook(SEED, **OF_A_RUN)


# All that the evaluations wrote, by content: what every analysis waits for, and made again when one of them changes. With each file an input of each of sixteen analyses, thousands of
# runs would take Snakemake minutes to plan.
rule results:
    input:
        RESULTS,
    output:
        f"{folder}/results.json",
    params:
        names=EVALUATION,
    shell:
        "python -W ignore -c 'import sys; from pathlib import Path; from dsft.files import contents, write_json; from dsft.study import load_study; "
        "write_json(Path(sys.argv[2]), contents(run.folder / name for run in load_study(sys.argv[1]).all_runs() for name in sys.argv[3:]))' {STUDY:q} {output:q} {params.names:q}"


LAYERS = [os.path.relpath(f) for f in sorted({r.layers_file for r in runs.values()})]
OTHER_CLAIMS = [os.path.relpath(p) for p in sorted(Path(figures).parent.glob("*/claims.csv")) if p.parent.name != study.name]

for name, outputs in ANALYSES.items():

    rule:
        name:
            name
        input:
            results=f"{folder}/results.json",
            layers=LAYERS,
            claims=[*(OTHER_CLAIMS if name in ("claims", "replication") else []), *([f"{figures}/claims.csv"] if name == "replication" else [])],
            notebook=ancient(f"nbs/analysis/{name}.ipynb"),
        output:
            [f"{figures}/{output}" for output in outputs],
        log:
            *logs(f"{folder}/analysis/{name}"),
        resources:
            mem_mb=8_000,
            runtime=60,
        params:
            code=code(f"nbs/analysis/{name}.ipynb"),
            smallest_effect=study.smallest_effect,
        shell:
            notebook()
