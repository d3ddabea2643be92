"""The outputs of the committed notebooks are made from what is committed, and what makes them stale."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_files

from dsft.files import git
from dsft.notebooks import all_notebooks, files_read, has_outputs, is_stale, made_from


def test_no_committed_output_is_stale(monkeypatch):
    monkeypatch.chdir(ROOT)
    new = set(git("ls-files", "--modified", "--others", "--exclude-standard", "--", "figures").splitlines())  # of a study that was run here
    stale = [notebook for notebook in all_notebooks() if is_stale(notebook) and not new.intersection(files_read(notebook))]
    names = "\n".join(str(notebook.relative_to(ROOT)) for notebook in stale)
    assert not stale, f"the outputs of these notebooks are out of date; make them anew with: make notebooks\n{names}"


NOTEBOOK = Path("nbs/analysis/table.ipynb")
FILES = {
    ".gitignore": "runs/\n",
    "dsft/files.py": "from importlib.resources import files\nONE = 1\nREAD = files('dsft') / 'lexicon.csv', files('dsft') / 'benchmarks' / f'{ONE}.yaml'",
    "dsft/results.py": "from .files import ONE",
    "dsft/report.py": "TWO = 2",
    "dsft/lexicon.csv": "tree,Baum",
    "dsft/published.csv": "60",
    "dsft/benchmarks/xquad.yaml": "task: xquad",
    "params/tiny.yaml": "seeds: [0]",
    "params/other.yaml": "seeds: [0]",
    "figures/tiny/results.csv": "f1\n60",
    "figures/tiny/table1.md": "| 60 |",
    "figures/tiny/table2.md": "| 60 |",
    "figures/other/results.csv": "f1\n60",
    "models/small/config.json": "{}",
    "models/large/config.json": "{}",
    "nbs/lab/speed.csv": "1",
    "nbs/lab/lens.csv": "1",
    "runs/tiny/log.txt": "1",
    "README.md": "# Tiny",
    str(NOTEBOOK): [
        "from dsft.results import ONE",
        'study = "tiny"',
        'read("table1.md"), read("../lab/speed.csv"), load(root / "models" / "small"), read("README.md"), read("../../runs/tiny/log.txt")',
    ],
}


@pytest.fixture
def notebook(project) -> Path:
    """A notebook with the right mark in a project that git knows."""
    write_files(FILES)
    subprocess.run(["git", "init", "--quiet"], check=True)
    contents = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    NOTEBOOK.write_text(json.dumps(contents | {"metadata": {"dsft": {"made_from": made_from(NOTEBOOK)}}}), encoding="utf-8")
    assert not is_stale(NOTEBOOK)
    return NOTEBOOK


def change(path: str, old: str, new: str) -> None:
    """Replace `old` in a file; without it, write a new file."""
    text = Path(path).read_text(encoding="utf-8") if old else ""
    assert old in text
    Path(path).write_text(text.replace(old, new) if old else new, encoding="utf-8")


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        (str(NOTEBOOK), "import ONE", "import ONE as one"),
        ("dsft/results.py", "import ONE", "import ONE as one"),
        ("dsft/files.py", "ONE = 1", "ONE = 3"),
        ("dsft/lexicon.csv", "Baum", "Ast"),
        ("dsft/benchmarks/xquad.yaml", "xquad", "mlqa"),
        ("dsft/benchmarks/new.yaml", "", "task: new"),
        ("params/tiny.yaml", "0", "1"),
        ("figures/tiny/results.csv", "60", "61"),
        ("figures/tiny/inside.csv", "", "layer"),
        ("figures/tiny/table1.md", "60", "61"),
        ("models/small/config.json", "{}", "[]"),
        ("models/small/weights.bin", "", "0"),
        ("nbs/lab/speed.csv", "1", "2"),
    ],
)
def test_a_change_of_what_it_was_made_from_makes_a_notebook_stale(notebook, path, old, new):
    change(path, old, new)
    assert is_stale(notebook)


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        (str(NOTEBOOK), "import ONE", "import ONE\\n# a comment\\n"),
        (str(NOTEBOOK), '"outputs": []', '"outputs": [{"output_type": "stream", "name": "stdout", "text": "1"}]'),
        ("dsft/files.py", "ONE = 1", "# %% ../nbs/00_files.ipynb #1f2e\nONE = 1\n"),
        ("dsft/report.py", "TWO = 2", "TWO = 3"),
        ("dsft/published.csv", "60", "61"),
        ("params/other.yaml", "0", "1"),
        ("figures/tiny/table2.md", "60", "61"),
        ("figures/other/results.csv", "60", "61"),
        ("models/large/config.json", "{}", "[]"),
        ("nbs/lab/lens.csv", "1", "2"),
        ("nbs/analysis/other.ipynb", "", '{"cells": []}'),
        ("runs/tiny/log.txt", "1", "2"),
        ("README.md", "Tiny", "Small"),
    ],
)
def test_other_changes_do_not(notebook, path, old, new):
    change(path, old, new)
    assert not is_stale(notebook)


def test_neither_the_time_of_a_file_nor_its_commit_matters(notebook):
    os.utime("figures/tiny/results.csv", (0, 0))
    assert not is_stale(notebook)
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["add", "."], [*identity, "commit", "--quiet", "-m", "all"]):
        subprocess.run(["git", *command], check=True)
    assert not is_stale(notebook)


def test_prose_and_notebooks_that_are_not_executed_need_no_mark(project):
    raw = {"cell_type": "raw", "id": "0", "metadata": {}, "source": "---\nskip_exec: true\n---"}
    code = {"cell_type": "code", "id": "1", "metadata": {}, "source": "1 / 0", "outputs": [], "execution_count": None}
    for name, cells in (("prose", []), ("empty", [code | {"source": "\n"}]), ("skipped", [raw, code]), ("executed", [code])):
        Path(f"{name}.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    assert [has_outputs(f"{name}.ipynb") for name in ("prose", "empty", "skipped", "executed")] == [False, False, False, True]


def execute(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-P", "-m", "dsft.notebooks", *arguments], text=True, capture_output=True)


def test_the_command_executes_what_is_stale_and_stops_at_the_first_failure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "--quiet"], check=True)
    settings = {"repo": "tiny", "lib_name": "tiny", "lib_path": "tiny", "nbs_path": "nbs", "allowed_metadata_keys": "dsft", "user": "x", "author": "x"}
    lines = "".join(f"{key} = {value}\n" for key, value in settings.items())
    write_files({"settings.ini": f"[DEFAULT]\n{lines}", "nbs/data/f1.csv": "60"})
    write_files({"nbs/a.ipynb": ["print(open('data/f1.csv').read())"], "nbs/b.ipynb": ["1"], "nbs/prose.ipynb": []})

    first = execute()
    assert first.returncode == 0 and [line.split()[0] for line in first.stdout.splitlines()] == ["nbs/a.ipynb", "nbs/b.ipynb"], first
    assert "60" in Path("nbs/a.ipynb").read_text() and not is_stale("nbs/a.ipynb")
    written = {path: path.read_bytes() for path in Path("nbs").glob("*.ipynb")}
    subprocess.run([Path(sys.executable).with_name("nbdev_clean")], check=True)
    assert {path: path.read_bytes() for path in written} == written

    assert execute("--stale").stdout == ""
    Path("nbs/data/f1.csv").write_text("61")
    assert [line.split()[0] for line in execute("--stale").stdout.splitlines()] == ["nbs/a.ipynb"]
    assert "61" in Path("nbs/a.ipynb").read_text()

    write_files({"nbs/a.ipynb": ["1 / 0"]})
    before = Path("nbs/a.ipynb").read_bytes()
    failed = execute("nbs/a.ipynb", "nbs/b.ipynb")
    assert failed.returncode == 1 and "ZeroDivisionError" in failed.stderr and "nbs/b.ipynb" not in failed.stdout
    assert failed.stderr.splitlines()[-1] == "dsft: nbs/a.ipynb failed, see above; it is left as it was"
    assert Path("nbs/a.ipynb").read_bytes() == before and sorted(path.name for path in Path("nbs").iterdir()) == ["a.ipynb", "b.ipynb", "data", "prose.ipynb"]
