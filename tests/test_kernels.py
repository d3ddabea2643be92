"""Notebooks in forked processes: nothing outlives what started it, and they compute what a process of their own computes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from dsft.kernels import SERVER, start_server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")


@pytest.fixture
def server(tmp_path, monkeypatch, request) -> Iterator[subprocess.Popen]:
    """A server that has imported the modules which the test's parameter names, if it does."""
    monkeypatch.setenv(SERVER, "")
    server = start_server(str(tmp_path / "socket"), getattr(request, "param", []))
    yield server
    server.stdin.close()
    assert server.wait(60) == 0


def start(folder: Path, code: str, **environment: str) -> subprocess.Popen:
    """Execute a notebook of one cell in `folder`; its executed copy is out.ipynb."""
    nbformat.write(new_notebook(cells=[new_code_cell(code)], metadata={"kernelspec": {"name": "python3", "display_name": ""}}), folder / "in.ipynb")
    command = [sys.executable, "-m", "dsft.kernels", folder / "in.ipynb", folder / "out.ipynb", "--no-progress-bar"]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell in the background passes on that it is not
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, preexec_fn=heard)


def soon(true: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether something becomes true in time."""
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.1)
    return true()


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


TRAINING = """
import hashlib, random, sys
print("torch" in sys.modules)
import numpy, torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 8))
optimizer = torch.optim.AdamW(model.parameters())
for step in range(20):
    model(torch.randn(32, 64)).logsumexp(1).mean().backward()
    optimizer.step()
print(torch.get_num_threads(), hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())
"""


@pytest.mark.parametrize("server", [["torch"]], indirect=True)
def test_a_training_is_the_same_to_the_bit(server, tmp_path):
    told = []
    for path in (os.environ[SERVER], ""):
        assert start(tmp_path, TRAINING, **{SERVER: path}).wait(120) == 0
        told.append("".join(output.text for output in nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs).split())
    assert [told[0][0], told[1][0]] == ["True", "False"]
    assert told[0][1:] == told[1][1:] and told[0][1] == "1"


SLEEP = "import os, time; from pathlib import Path; Path({!r}).write_text(f'{{os.getpid()}} {{os.getppid()}}'); time.sleep(600)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_job_and_kernel_end_with_their_client(server, tmp_path, number):
    client = start(tmp_path, SLEEP.format(str(tmp_path / "pids")))
    assert soon(lambda: (tmp_path / "pids").exists() and bool((tmp_path / "pids").read_text()))
    kernel, job = map(int, (tmp_path / "pids").read_text().split())
    client.send_signal(number)
    assert client.wait(10) != 0
    assert soon(lambda: gone(kernel) and gone(job))
    assert server.poll() is None


def test_a_killed_job_fails(server, tmp_path):
    client = start(tmp_path, SLEEP.format(str(tmp_path / "pids")))
    assert soon(lambda: (tmp_path / "pids").exists() and bool((tmp_path / "pids").read_text()))
    kernel, job = map(int, (tmp_path / "pids").read_text().split())
    os.kill(job, signal.SIGKILL)
    assert client.wait(10) == 1 and soon(lambda: gone(kernel))


STARTER = """
import sys, time
from dsft.kernels import start_server
print(start_server(sys.argv[1], ["colorsys"]).pid, flush=True)
time.sleep(600)
"""


def test_the_server_ends_when_the_study_is_killed(tmp_path):
    starter = subprocess.Popen([sys.executable, "-c", STARTER, tmp_path / "socket"], stdout=subprocess.PIPE, text=True)
    server = int(starter.stdout.readline())
    assert not gone(server)
    starter.kill()
    starter.wait()
    assert soon(lambda: gone(server))


def test_a_process_with_threads_is_not_forked():
    code = "import threading; from dsft.kernels import may_fork; print(may_fork()); threading.Timer(1, int).start(); print(may_fork())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["True", "False"]
