"""`make faults`: a study that is killed again and again leaves what an undisturbed one leaves.

The study runs once undisturbed. Then it is started and killed (SIGKILL) at a random moment of some phase, started again and killed again, ... and at last runs to its end. Where that end comes
before all points are used up, the rest disturbs the study once more from its beginning. Nothing is unlocked or cleaned up in between. All weights, metrics and tables are compared, to the bit. Half of
the kills hit every process at once, the server of kernels and its notebooks included, as a machine that goes down does; the other half hits the process group of `make` alone, and the study is started again while
the rest is still ending.

    python tests/faults.py [--study smoke] [--seed 0] [--points 24] [--folder runs/faults]

writes report.json and report.md into the folder; exit code 1 when a file differs.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml
from fastcore.script import call_parse

from dsft.files import SUMS, write_json
from dsft.settings import read_settings

ROOT = Path(__file__).parents[1]
OUTSIDE = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}  # as if no `make` ran around it


class Phase(NamedTuple):
    """A part of a study."""

    notebook: str  # which is at work in it
    share: int  # of the points, in parts of 24
    window: float  # the kill comes in this first part of a job; what goes on from a checkpoint has less to do each time


PHASES = {  # in the order of a study
    "pretraining": Phase("pretrain", 5, 0.25),
    "layers": Phase("select_layers", 1, 0.8),
    "training": Phase("train", 6, 0.6),
    "checkpoint": Phase("train", 4, 0.3),  # while one is written
    "evaluation": Phase("evaluate", 5, 0.8),
    "analysis": Phase("analysis", 3, 0.8),
}
KINDS = {  # what is compared
    "weights": ("runs/**/*.safetensors",),
    "metrics": ("runs/**/metrics.json",),
    "samples, logs and reports": ("runs/**/*.jsonl", "runs/**/inside.json", "runs/**/layers.json", "runs/**/data_report.json", "runs/**/params.yaml"),
    "tables": ("figures/**/*.csv", "figures/**/*.md", "figures/**/*.parquet"),
    "figures": ("figures/**/*.svg", "figures/**/*.png"),
}
MEASURED = ("cost", "costs")  # the stems of tables and figures that hold measured seconds


class Point(NamedTuple):
    """One kill: in a job of `phase`, after this share of the time that such a job takes."""

    phase: str
    share: float
    everything: bool  # every process at once, or the process group of what was started


def draw(seed: int, number: int) -> list[Point]:
    """About so many random points, some in each phase."""
    rng = random.Random(seed)
    drawn = [Point(name, rng.random() * phase.window, rng.random() < 0.5) for name, phase in PHASES.items() for _ in range(max(1, round(phase.share * number / 24)))]
    return sorted(drawn, key=lambda point: rng.random())


def write_copy(study: str, folder: Path, **changes: Any) -> Path:
    """The study as a file of its own in `folder`, where its runs and figures go as well; of the same name, so that its results are the same."""
    content, path, _ = read_settings(study)
    content |= {"runs": str(folder / "runs"), "figures": str(folder / "figures")} | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / path.name).write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return folder / path.name


class Job(NamedTuple):
    """A notebook that is executed."""

    notebook: str
    log: str


def jobs(process: psutil.Process) -> set[Job]:
    """The notebooks that are executed below a process: begun, not waiting for the server of kernels."""
    found = set()
    with suppress(psutil.NoSuchProcess):
        for child in process.children(recursive=True):
            with suppress(psutil.Error, OSError, ValueError):
                notebook, log, *_ = (command := child.cmdline())[command.index("dsft.kernels") + 1 :]
                if notebook != "--serve" and (ROOT / log).stat().st_mtime > child.create_time():
                    found.add(Job("analysis" if "analysis" in Path(notebook).parts else Path(notebook).stem, log))
    return found


def unsealed(folder: Path) -> list[Path]:
    """The checkpoints that are being written."""
    return [path for path in folder.glob("runs/*/*/*/*/*/checkpoints-*/checkpoint-*") if not (path / SUMS).exists()]


class Started:
    """A study that was started, in a session of its own."""

    def __init__(self, command: Sequence[str], log: Path):
        with log.open("ab") as out:
            self.popen = subprocess.Popen(command, cwd=ROOT, env=OUTSIDE, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        self.process, self.seen = psutil.Process(self.popen.pid), {}  # job -> when it was first and last seen

    def watch(self, pause: float = 0.05) -> Iterator[set[Job]]:
        """The jobs that run, now and again, until the study has ended."""
        while self.popen.poll() is None:
            now, running = time.monotonic(), jobs(self.process)
            for job in running:
                self.seen[job] = (self.seen.get(job, (now,))[0], now)
            yield running
            time.sleep(pause)

    def seconds(self) -> dict[str, float]:
        """Notebook -> how long the shortest of its jobs took."""
        took = {}
        for job, (first, last) in self.seen.items():
            took[job.notebook] = min(last - first, took.get(job.notebook, last - first))
        return took

    def kill(self, everything: bool) -> None:
        """Kill every process at once, or the process group alone."""
        stopped = []
        while everything and (new := [process for process in (self.process, *self.process.children(recursive=True)) if process not in stopped]):
            for process in new:  # none of them may see that another one has gone
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
            stopped += new
        os.killpg(self.popen.pid, signal.SIGKILL)
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.popen.wait()


def due(started: Started, running: set[Job], left: Sequence[Point], took: dict[str, float]) -> tuple[Point, float] | None:
    """The first of the points whose moment has come in one of the jobs that run, and how long that job has been running; of each notebook only the first point left counts."""
    first = {}
    for point in left:
        first.setdefault(PHASES[point.phase].notebook, point)
    for job in running:
        since, point = time.monotonic() - started.seen[job][0], first.get(job.notebook)
        if point and since >= point.share * took.get(job.notebook, 1.0):
            return point, since
    return None


def caught_writing(folder: Path, seconds: float) -> list[str]:
    """The checkpoints that are being written, as soon as there are any, in the next so many seconds."""
    end = time.monotonic() + seconds
    while not (written := unsealed(folder)) and time.monotonic() < end:
        time.sleep(0.0005)
    return [str(path.relative_to(folder)) for path in written]


def next_kill(started: Started, left: Sequence[Point], took: dict[str, float], folder: Path) -> tuple[Point, dict[str, Any]] | None:
    """Wait until the moment of one of the points has come; that point and what runs then. None: the study has ended before."""
    for running in started.watch():
        if (found := due(started, running, left, took)) is None:
            continue
        point, since = found
        told = {"phase": point.phase, "everything": point.everything, "after": round(since, 2), "jobs": sorted(os.path.relpath(job.log, folder) for job in running)}
        if point.phase != "checkpoint":
            return point, told
        if written := caught_writing(folder, took["train"]):
            time.sleep(0.01 * point.share)
            return point, told | {"writing": written}
    return None


def disturb(command: Sequence[str], folder: Path, left: list[Point], took: dict[str, float]) -> list[dict[str, Any]]:
    """Start a study, kill it at points of `left`, which are taken from there, and start it again, until it ends; returns the kills. Raises RuntimeError when it fails."""
    kills = []
    while True:
        started = Started(command, folder / "study.log")
        if (found := next_kill(started, left, took, folder)) is None:
            break
        started.kill(found[0].everything)
        left.remove(found[0])
        kills.append(found[1])
        print(f"killed in {found[1]['phase']}, after {found[1]['after']} s: {' '.join(found[1]['jobs'])}", flush=True)
    if started.popen.wait():
        raise RuntimeError(f"the study failed after {len(kills)} kills:\n{(folder / 'study.log').read_text(errors='replace')[-3000:]}")
    return kills


def compare(one: Path, other: Path) -> dict[str, dict[str, Any]]:
    """Kind of file -> how many there are and which are not the same in both folders, to the bit."""
    compared = {}
    for kind, patterns in KINDS.items():
        names = {path.relative_to(folder) for folder in (one, other) for pattern in patterns for path in folder.glob(pattern) if path.stem not in MEASURED}
        same = lambda name: (one / name).exists() and (other / name).exists() and (one / name).read_bytes() == (other / name).read_bytes()
        compared[kind] = {"files": len(names), "different": sorted(str(name) for name in names if not same(name))}
    return compared


def left_behind(folder: Path) -> list[str]:
    """What no undisturbed run leaves: temporary files and checkpoints."""
    patterns = ("**/.*.tmp", "**/.*.old", "**/checkpoints-*", "**/pretrain-checkpoints-*")
    return sorted(str(path.relative_to(folder)) for pattern in patterns for path in folder.glob(pattern))


def as_markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    kills, compared = report["kills"], report["compared"]
    lines = [f"# Study {report['study']}, killed {len(kills)} times", ""]
    lines += [f"Undisturbed it took {report['undisturbed_seconds']:.0f} s; killed and started again, {report['passes']} x to its end, {report['disturbed_seconds']:.0f} s. Manual unlocks: none.", ""]
    lines += ["| phase | kills | of every process at once |", "|---|---|---|"]
    for phase in PHASES:
        hit = [kill for kill in kills if kill["phase"] == phase]
        lines.append(f"| {phase} | {len(hit)} | {sum(kill['everything'] for kill in hit)} |")
    lines += ["", "| what | files | different |", "|---|---|---|"]
    lines += [f"| {kind} | {found['files']} | {len(found['different'])} |" for kind, found in compared.items()]
    lines += ["", f"Not compared: what holds measured seconds ({', '.join(MEASURED)}). Left behind: {' '.join(report['left_behind']) or 'nothing'}.", ""]
    lines += ["| | phase | seconds into the job | jobs that ran | written |", "|---|---|---|---|---|"]
    lines += [f"| {n} | {k['phase']} | {k['after']} | {' '.join(k['jobs'])} | {' '.join(k.get('writing', ()))} |" for n, k in enumerate(kills, 1)]
    return "\n".join(lines) + "\n"


PASSES = 4  # at most


def study_faults(study: str, folder: Path, planned: Sequence[Point], command: Callable[[Path], Sequence[str]]) -> dict[str, Any]:
    """Run a study undisturbed and disturbed, in folders of `folder`; `command` starts one, given its file. Returns the report."""
    begun, left, kills, behind = time.monotonic(), list(planned), [], []
    for old in (folder / "undisturbed", *folder.glob("disturbed*")):
        shutil.rmtree(old, ignore_errors=True)
    quiet = Started(command(file := write_copy(study, folder / "undisturbed")), folder / "undisturbed" / "study.log")
    for _ in quiet.watch():
        pass
    if quiet.popen.returncode:
        raise RuntimeError(f"the undisturbed study failed:\n{(folder / 'undisturbed' / 'study.log').read_text(errors='replace')[-3000:]}")
    middle, took = time.monotonic(), quiet.seconds()
    print(f"undisturbed: {middle - begun:.0f} s; the shortest of each job: {', '.join(f'{name} {seconds:.1f} s' for name, seconds in took.items())}", flush=True)
    compared = {kind: {"files": 0, "different": []} for kind in KINDS}
    passes = 0
    while left and passes < PASSES:
        passes += 1
        disturbed = folder / f"disturbed{passes}"
        kills += disturb(command(write_copy(study, disturbed)), disturbed, left, took)
        behind += [f"{disturbed.name}/{path}" for path in left_behind(disturbed)]
        for kind, found in compare(folder / "undisturbed", disturbed).items():
            compared[kind]["files"] += found["files"]
            compared[kind]["different"] += [f"{disturbed.name}/{name}" for name in found["different"]]
    seconds = {"undisturbed_seconds": middle - begun, "disturbed_seconds": time.monotonic() - middle}
    return {"study": file.stem, **seconds, "passes": passes, "kills": kills, "not_hit": [point.phase for point in left], "compared": compared, "left_behind": behind}


@call_parse
def main(
    study: str = "smoke",  # the name of a study in params/, or the path of a YAML file
    seed: int = 0,  # draws the points
    points: int = 24,  # how many
    folder: str = "runs/faults",  # for both runs and the report
    cores: int = 2,  # for the study
):
    "Kill a study at random points and compare what it leaves with what an undisturbed one leaves; exit code 1 when a file differs"
    folder = ROOT / folder
    report = {"seed": seed} | study_faults(study, folder, draw(seed, points), lambda file: ["make", "study", f"STUDY={file}", f"CORES={cores}"])
    write_json(folder / "report.json", report)
    (folder / "report.md").write_text(as_markdown(report), encoding="utf-8")
    print((folder / "report.md").read_text(encoding="utf-8"))
    sys.exit(any(found["different"] or not found["files"] for found in report["compared"].values()))
