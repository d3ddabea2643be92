"""The one line about a study that runs: in a terminal, in a file, without either, and when it is interrupted. On a small workflow of Snakemake whose jobs sleep."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT

SNAKEFILE = """
from dsft.progress import watch

if workflow.is_main_process and not workflow.dryrun:
    watch(workflow)

rule all:
    input: "table"

rule train:
    output: "{method}.model"
    log: "{method}.ipynb", "{method}.stderr"
    shell: "printf 'zh: 45%%|###  | 9/20' > {log[1]}; sleep {config[sleep]}; "
        "if [ {wildcards.method} = bad ]; then cp failed.ipynb {log[0]}; exit 1; fi; touch {output}"

rule table:
    input: [f"{m}.model" for m in config["methods"].split(",")]
    output: "table"
    shell: "touch {output}"
"""
FAILED = """{"cells": [{"cell_type": "code", "metadata": {}, "source": "1", "outputs": []}, {"cell_type": "code", "metadata": {}, "source": "1 / 0",
 "outputs": [{"output_type": "error", "ename": "ZeroDivisionError", "evalue": "division by zero", "traceback": []}]}]}"""
COMMAND = [sys.executable, "-m", "snakemake", "--cores", "2", "--nolock", "--keep-going"]
LINE = r"\d of \d steps[^\r\n]*"


@pytest.fixture
def workflow(tmp_path) -> Path:
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    (tmp_path / "failed.ipynb").write_text(FAILED)
    return tmp_path


def command(methods: str, sleep: float, *quiet: str) -> list[str]:
    return [*COMMAND, "--config", f"sleep={sleep}", f"methods={methods}", "--quiet", *quiet]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)} | more


class Terminal:
    """A command in a terminal of so many columns."""

    def __init__(self, arguments: list[str], folder: Path, columns: int):
        self.ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, columns))
        self.process = subprocess.Popen(
            arguments, cwd=folder, env=environment(TERM="xterm"), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        self.shown = ""

    def read(self, until: str = "(?!)") -> str:
        """What it has shown, when it has shown that or ended."""
        with suppress(OSError):  # the other side is closed
            while not re.search(until, self.shown) and (piece := os.read(self.ours, 4096)):
                self.shown += piece.decode(errors="replace")
        return self.shown

    def lines(self) -> list[str]:
        """The lines that were drawn, each over the one before."""
        return re.findall(LINE, self.shown)


@pytest.mark.parametrize("columns", [40, 100])
def test_a_terminal_shows_one_line_that_fits(workflow, columns):
    terminal = Terminal(command("one,another", 1.5), workflow, columns)
    shown = terminal.read()
    assert terminal.process.wait() == 0
    *drawn, last = terminal.lines()
    assert drawn and all(len(line) < columns for line in drawn)
    assert re.fullmatch(r"4 of 4 steps in \d+ s", last)
    if columns == 100:
        assert any(line == "0 of 4 steps · train another 45 % · train one 45 %" for line in drawn), drawn
    between = shown.split(drawn[0])[1].split(last)[0]
    assert "\n" not in between  # drawn in place


def test_a_file_has_few_plain_lines_and_a_failure_in_three(workflow):
    with (workflow / "study.log").open("w") as log:
        ended = subprocess.run(command("good,bad", 0.7, "rules", "host", "progress", "reason"), cwd=workflow, env=environment(TERM="xterm"), stdout=log, stderr=log)
    said = (workflow / "study.log").read_text()
    assert ended.returncode == 1 and "\r" not in said and "\x1b[K" not in said
    assert "bad failed in cell 2\n  ZeroDivisionError: division by zero\n  bad.ipynb\n" in said
    assert "CalledProcessError" not in said and len(said.splitlines()) < 12, said
    assert re.search(r"^\d\d:\d\d 0 of 4 steps · train bad 45 % · train good 45 %$", said, re.M)
    assert re.search(r"^1 of 4 steps, 1 failed in \d+ s$", said, re.M)


def test_without_a_terminal_that_works_the_study_is_made(workflow):
    """No stderr at all, and one whose reader has gone."""
    closed = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command("one", 0.7)], cwd=workflow, env=environment(), stdout=subprocess.DEVNULL)
    assert closed.returncode == 0 and (workflow / "table").exists()
    (workflow / "table").unlink()
    reader, writer = os.pipe()
    process = subprocess.Popen(command("one", 0.7, "rules", "host", "progress", "reason"), cwd=workflow, env=environment(), stdout=subprocess.DEVNULL, stderr=writer)
    os.close(writer)
    os.close(reader)
    assert process.wait() == 0 and (workflow / "table").exists()


def test_an_interrupted_study_says_how_far_it_came(workflow):
    terminal = Terminal(command("slow", 60), workflow, 80)
    terminal.read("train slow")
    started = time.monotonic()
    os.killpg(terminal.process.pid, signal.SIGINT)  # as Ctrl-C does
    shown = terminal.read()
    assert terminal.process.wait() != 0 and time.monotonic() - started < 30
    assert re.search(r"interrupted: 0 of 3 steps in \d+ s", shown) and "Traceback" not in shown and "failed" not in shown, shown[-2000:]
    assert not (workflow / "slow.model").exists()
