"""A rehearsed study is the study: its methods, sweeps, prompts, benchmarks and formats; only sizes, places and models are others."""

import shutil
from pathlib import Path

import pytest
import yaml

from dsft.checks import check
from dsft.rehearsal import rehearsed
from dsft.study import load_study

ROOT = Path(__file__).parents[1]
STUDIES = sorted(file.stem for file in (ROOT / "params").glob("*.yaml"))


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project that has the studies and the bases of this one, and nothing else; without the hub."""
    (tmp_path / "settings.ini").touch()
    for name in ("params", "models"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dsft.rehearsal.hub_in_reach", lambda: False)
    return tmp_path


def rehearse(project: Path, name: str) -> str:
    """The path of a study's rehearsal, written."""
    file = project / "runs" / "rehearsal" / f"{name}.yaml"
    content = rehearsed(name, file.parent / "stand-ins" / name, lambda line: None)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(file)


SIZES = {  # what may differ
    "data": {"items", "files", "held_out", "text", "dictionaries"},
    "train": {"max_steps", "batch_size", "per_device_batch_size", "logging_steps", "save_steps", "launch"},
    "evaluation": {"items", "batch_size", "max_new_tokens", "max_translation_tokens", "device", "source", "data_dir", "facts"},
}


@pytest.mark.parametrize("name", STUDIES)
def test_the_rehearsal_of_a_study_has_all_that_is_in_it(project, name):
    original, small = load_study(name), load_study(rehearse(project, name))
    key = lambda run: (run.model, run.lang, run.method.name)
    assert sorted({key(run) for run in original.all_runs()}) == sorted(key(run) for run in small.all_runs())
    assert (small.methods, small.layers, small.published_as, small.swept_knob) == (original.methods, original.layers, original.published_as, original.swept_knob)
    for part, changes in SIZES.items():
        before, after = (getattr(study, part).model_dump(exclude=changes) for study in (original, small))
        assert before == after
    formats = [{lang: (table.format, table.fields) for lang, table in study.data.files.items()} for study in (original, small)]
    assert formats[0] == formats[1] and bool(small.train.launch) == bool(original.train.launch)
    assert small.folder().is_relative_to(project / "runs" / "rehearsal") and small.figures_folder().is_relative_to(project / "runs" / "rehearsal")


@pytest.mark.parametrize("name", STUDIES)
def test_all_that_a_rehearsal_names_is_there(project, name, capsys):
    check(rehearse(project, name))
    assert f"study {name}: " in capsys.readouterr().out


def test_tables_of_the_users_own_are_read_as_they_are(project):
    shutil.copytree(project / "models" / "micro-llama", project / "base")
    for lang in ("en", "th"):
        (project / f"{lang}.json").write_text("[]", encoding="utf-8")
    study = {"models": {"m": {"path": "base"}}, "languages": ["th"], "methods": ["tft"], "data": {"source": "files", "files": {"en": "en.json", "th": "th.json"}}}
    study |= {"evaluation": {"source": "hub", "backend": "vllm", "num_fewshot": 2, "benchmarks": ["xquad"]}, "seeds": [3, 4]}
    (project / "params" / "mine.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    small = load_study(rehearse(project, "mine"))
    assert {lang: table.path for lang, table in small.data.files.items()} == {"en": "en.json", "th": "th.json"}
    assert (small.evaluation.backend, small.evaluation.num_fewshot, small.seeds) == ("hf", 2, (3,))
    assert (project / small.models["m"].path).is_relative_to(project / "runs") and (project / "runs/rehearsal/stand-ins/mine/benchmarks/xquad/xquad.th.json").is_file()
