"""The order of the modules: each imports only what lies below it, and the numbers of the notebooks tell that order."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import grimp
import pytest
from conftest import ROOT, write_files

from dsft.files import code_digest, import_closure, python_code
from dsft.notebooks import all_notebooks

MODULES = sorted(file for file in (ROOT / "dsft").rglob("*.py") if not file.name.startswith("_"))


def dotted(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def test_modules_import_only_what_lies_below_them():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    result = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("file", MODULES, ids=dotted)
def test_no_function_imports_another_module_of_the_library(file):
    functions = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for statement in (node for function in functions for node in ast.walk(function)):
        ours = isinstance(statement, ast.ImportFrom) and (statement.level or statement.module.split(".")[0] == "dsft")
        ours = ours or isinstance(statement, ast.Import) and any(name.name.split(".")[0] == "dsft" for name in statement.names)
        assert not ours, f"{file.name}, line {statement.lineno}: {ast.unparse(statement)}"


def place(notebook: Path) -> str:
    """Where a notebook stands in the order of names: those with numbers, the recipes between the trainer and the training, the others last."""
    trainer = next((ROOT / "nbs").glob("*_trainer.ipynb")).name
    return f"{trainer}~" if notebook.parent.name == "recipes" else notebook.name if notebook.name[0].isdigit() else "~"


def test_numbers_of_notebooks_are_an_order_of_imports(monkeypatch):
    monkeypatch.chdir(ROOT)
    modules = {notebook: re.search(r"^#\| *default_exp (\S+)", python_code(notebook), re.MULTILINE) for notebook in all_notebooks()}
    places = {f"dsft.{module[1]}": place(notebook) for notebook, module in modules.items() if module}
    assert set(places) == set(map(dotted, MODULES))
    wrong = [f"{dotted(file)} imports {other}" for file in MODULES for other in imports(file) if places[other] >= places[dotted(file)]]
    assert not wrong, f"these modules import others whose notebooks come later: {'; '.join(wrong)}"


def imports(file: Path) -> set[str]:
    """The modules that a module imports, directly or not, by `import_closure`; without packages."""
    return {dotted(found) for found in import_closure(file) if found.name != "__init__.py"}


def test_the_closure_is_what_another_tool_finds(monkeypatch):
    monkeypatch.chdir(ROOT)
    graph = grimp.build_graph("dsft", cache_dir=None)
    for file in MODULES:
        assert imports(file) == graph.find_upstream_modules(dotted(file)) - {"dsft", "dsft.recipes"}, dotted(file)


FILES = {
    "dsft/files.py": "",
    "dsft/a.py": "from .files import digest",
    "dsft/b.py": "import torch\n\ndef f():\n    import dsft.a as a\n",
    "dsft/loop.py": "from . import pool",
    "dsft/pool.py": "from dsft import loop",
    "dsft/recipes/one.py": "from ..a import x\nfrom .two import y",
    "dsft/recipes/two.py": "from .. import files",
}


@pytest.mark.parametrize(
    ("code", "without", "found"),
    [
        ("import json, torch.nn", [], []),
        ("import dsft", [], ["__init__"]),
        ("import dsft.a", [], ["__init__", "a", "files"]),
        ("from dsft import a", [], ["__init__", "a", "files"]),
        ("from dsft.a import x", [], ["__init__", "a", "files"]),
        ("from dsft.b import *", [], ["__init__", "a", "b", "files"]),
        ("import dsft.loop", [], ["__init__", "loop", "pool"]),
        ("import dsft.recipes.two", [], ["__init__", "files", "recipes/__init__", "recipes/two"]),
        ("import dsft.recipes.one", [], ["__init__", "a", "files", "recipes/__init__", "recipes/one", "recipes/two"]),
        ("import dsft.recipes.one", ["dsft.recipes.two"], ["__init__", "a", "files", "recipes/__init__", "recipes/one"]),
        ("import dsft.recipes.one, dsft.b", ["dsft.recipes"], ["__init__", "a", "b", "files"]),
        ("import dsft.recipes.one", ["dsft"], []),
        ("import dsft.b, dsft.recipes.two", ["dsft.a"], ["__init__", "b", "files", "recipes/__init__", "recipes/two"]),
        ("%load_ext autoreload\n!ls\nif 1:\n    %time import dsft.b\nimport dsft.files", [], ["__init__", "files"]),
        ("import dsftools, dsft2.a", [], []),
    ],
)
def test_closure_of_a_notebook(project, code, without, found):
    write_files(FILES | {"nbs/x/notebook.ipynb": ["x = 1", code]})
    assert [str(file.relative_to(project / "dsft").with_suffix("")) for file in import_closure("nbs/x/notebook.ipynb", without)] == found


def test_packages_import_too(project):
    write_files(FILES | {"dsft/recipes/__init__.py": "from ..pool import x", "notebook.ipynb": ["from dsft.recipes.two import y"]})
    assert [file.name for file in import_closure("notebook.ipynb")] == ["__init__.py", "files.py", "loop.py", "pool.py", "__init__.py", "two.py"]


def test_digest_of_code(project):
    write_files({"a.py": "x = 1\n", "b.py": "# one\n\nx = 1\n\n# end", "c.ipynb": ["#| hide", "x = 1"], "d.py": "x = 1  # one\n", "e.py": "x = 2"})
    one, *others = (code_digest([name]) for name in ("a.py", "b.py", "c.ipynb", "d.py", "e.py"))
    assert [other == one for other in others] == [True, True, False, False]
    assert code_digest(["a.py", "e.py"]) != code_digest(["e.py", "a.py"])


def test_files_and_notebooks_need_no_heavy_library():
    """The Snakefile uses them, at every start of every job."""
    code = "import sys; import dsft.files; sys.exit(bool({'torch', 'transformers', 'pandas', 'numpy', 'nbdev', 'IPython'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
