"""What a study survives: kills, a full disk, a folder that may only be read, bytes that flip, files exchanged under the same name, two at once, a study file of a stranger.

Each is noticed and told in one line, and none of them yields a number.
"""

import ast
import atexit
import errno
import fcntl
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from faults import Point, compare, draw, study_faults

from dsft.checks import check
from dsft.data import parallel_pairs
from dsft.files import SUMS, ParamsError, clear_temporary, contents, damage, digest, exclusive, hold, python_code, read_rows, replacing, seal, write_json, write_jsonl, writing
from dsft.generation import resumable_map
from dsft.report import headline
from dsft.results import check_records
from dsft.study import Run, Study, load_study
from dsft.tasks import write_tasks
from dsft.training import Checkpoints, fine_tune, last_complete_checkpoint, save_training

ROOT = Path(__file__).parents[1]


@cache
def tiny_base() -> str:
    """A base model of random weights with the tokenizer of the microcosm."""
    folder = tempfile.mkdtemp(prefix="dsft-base-")
    atexit.register(shutil.rmtree, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "models" / "micro-llama")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, vocab_size=len(tokenizer))
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
    return folder


SMALL = {
    "models": {"m": {"path": tiny_base()}},
    "languages": ["zh"],
    "methods": ["base", "dsft_feature"],
    "layers": {"i": 1, "j": 3},
    "data": {"items": 16},
    "train": {"epochs": 1, "batch_size": 2, "per_device_batch_size": 2, "learning_rate": 1e-3, "bf16": False, "logging_steps": 1, "save_steps": 1},
    "evaluation": {"items": 8, "benchmarks": ["xcopa"]},
}


def snakemake(file: Path, target: Path | None = None) -> list[str]:
    """The command that makes a file of a small study, by default its first table."""
    target = os.path.relpath(target or file.parent / "figures" / file.stem / "table1.csv", ROOT)
    return ["snakemake", target, "--config", f"study={file}", "--nolock", "--rerun-incomplete", "--cores", "2", "--quiet", "host"]


# ---- killed


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, dict]:
    """A small study undisturbed and killed at three points; its folder and the report."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    three = [Point("training", 0.2, everything=False), Point("checkpoint", 0.0, everything=True), Point("evaluation", 0.2, everything=True)]
    return folder, study_faults(str(folder / "small.yaml"), folder, three, snakemake)


def test_a_study_killed_three_times_leaves_the_same_to_the_bit(killed):
    folder, report = killed
    hit = {kill["phase"]: kill for kill in report["kills"]}
    assert hit.keys() == {"training", "checkpoint", "evaluation"} and not report["not_hit"]
    assert all("dsft_feature" in path for path in hit["checkpoint"]["writing"])
    assert all(not found["different"] for found in report["compared"].values()), report["compared"]
    assert {kind: found["files"] // report["passes"] for kind, found in report["compared"].items()} == {"weights": 3, "metrics": 2, "samples, logs and reports": 11, "tables": 6, "figures": 0}
    log = read_rows(folder / "disturbed1" / "runs" / "small" / "m" / "zh" / "dsft_feature" / "seed0" / "train_log.jsonl")
    assert [entry["step"] for entry in log if "loss" in entry] == [*range(1, 9)] and log[-1]["loss_lc"] > 0
    assert [entry["step"] for entry in log if "grad_norm_lc" in entry] == [0]  # measured once, however often it was killed


def test_a_difference_is_found(tmp_path):
    for name, f1 in (("one", 50), ("other", 51)):
        write_json(tmp_path / name / "runs" / "s" / "metrics.json", {"f1": f1})
    assert compare(tmp_path / "one", tmp_path / "other")["metrics"] == {"files": 1, "different": ["runs/s/metrics.json"]}


def test_points_are_drawn_by_their_seed_in_every_phase():
    assert draw(7, 24) == draw(7, 24) != draw(8, 24)
    assert len(draw(0, 24)) >= 20 and len({point.phase for point in draw(0, 24)}) == 6


def test_a_trained_model_whose_bytes_flip_is_not_evaluated(killed):
    folder = killed[0] / "disturbed1"
    run = load_study(folder / "small.yaml").run("m", "zh", "dsft_feature", 0)
    run.check_trained()
    assert subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=run.trained).returncode == 0
    with flipped(Path(run.trained) / "model.safetensors"):
        with pytest.raises(ParamsError, match="model.safetensors is not what was written"):
            run.check_trained()
        (run.folder / "metrics.json").unlink()
        result = subprocess.run(snakemake(folder / "small.yaml", run.folder / "metrics.json"), cwd=ROOT, capture_output=True, text=True)
        told = [line.strip() for line in (result.stdout + result.stderr).splitlines() if line.strip().startswith("ParamsError: ")]
        assert result.returncode and len(told) == 1 and "model.safetensors is not what was written" in told[0], result.stdout + result.stderr
        assert not (run.folder / "metrics.json").exists()


def test_a_second_start_of_a_study_is_refused(killed):
    """The lock lies in the run folder: it also holds for another clone of the project with the same runs."""
    folder = killed[0] / "undisturbed"
    with (folder / "runs" / "small" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = subprocess.run(snakemake(folder / "small.yaml"), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode and "dsft: study small is already running" in result.stdout + result.stderr


# ---- checkpoints


def small(folder: Path, **changes) -> Study:
    return Study(**{"name": "small", **SMALL, "runs": str(folder), **changes})


def prepared(study: Study, method: str = "dsft_feature") -> Run:
    """A run with its layers at hand."""
    run = study.run(next(iter(study.models)), "zh", method, 0)
    write_json(run.layers_file, {"i": 1, "j": 3})
    return run


class flipped:
    """A context in which one bit in the middle of a file is another one."""

    def __init__(self, file: Path):
        self.file, self.kept = file, file.read_bytes()

    def __enter__(self):
        middle = len(self.kept) // 2
        self.file.write_bytes(self.kept[:middle] + bytes([self.kept[middle] ^ 1]) + self.kept[middle + 1 :])

    def __exit__(self, *_):
        self.file.write_bytes(self.kept)


def weights(run: Run) -> bytes:
    return (Path(run.trained) / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> tuple[Path, bytes]:
    """A run that stopped after its fifth step, with the checkpoints of the fourth and the fifth; its folder, and the weights that it leaves undisturbed."""
    folder = tmp_path_factory.mktemp("interrupted")
    whole = prepared(small(folder / "whole"))
    save_training(whole, fine_tune(whole), 0.0, "pytest")

    class Cut(Checkpoints):
        def on_save(self, args, state, control, **kwargs):
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            shutil.rmtree(Path(args.output_dir) / f"checkpoint-{state.global_step - 2}", ignore_errors=True)
            if state.global_step == 5:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dsft.training.Checkpoints", Cut)
        fine_tune(prepared(small(folder / "cut")))
    return folder / "cut", weights(whole)


@pytest.fixture
def cut(interrupted, tmp_path) -> Run:
    """A copy of the interrupted run, which may be spoilt."""
    shutil.copytree(interrupted[0], tmp_path / "runs")
    run = prepared(small(tmp_path / "runs"))
    assert last_complete_checkpoint(run.checkpoints) == str(run.checkpoints / "checkpoint-5")
    return run


SPOIL = {
    "flip": lambda file: flipped(file).__enter__(),
    "truncate": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "delete": lambda file: file.unlink(),
}


@pytest.mark.parametrize("how", SPOIL)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json", SUMS])
def test_a_spoilt_checkpoint_is_passed_over_with_a_line(cut, capfd, name, how):
    SPOIL[how](cut.checkpoints / "checkpoint-5" / name)
    assert last_complete_checkpoint(cut.checkpoints) == str(cut.checkpoints / "checkpoint-4")
    (told,) = capfd.readouterr().err.splitlines()
    assert "checkpoint-5: " in told and "training goes on from the checkpoint before it, or begins again" in told


@pytest.mark.parametrize("spoilt", [(5,), (4, 5)])
def test_training_from_an_older_checkpoint_or_anew_leaves_the_same_weights(interrupted, cut, spoilt):
    for step in spoilt:
        SPOIL["flip"](cut.checkpoints / f"checkpoint-{step}" / "optimizer.pt")
    started = []
    with pytest.MonkeyPatch.context() as patch:
        train = transformers.Trainer.train
        patch.setattr(transformers.Trainer, "train", lambda self, resume_from_checkpoint=None: started.append(resume_from_checkpoint) or train(self, resume_from_checkpoint))
        save_training(cut, fine_tune(cut), 0.0, "pytest")
    assert [checkpoint and Path(checkpoint).name for checkpoint in started] == ["checkpoint-4" if 4 not in spoilt else None]
    assert weights(cut) == interrupted[1]
    assert sorted(path.name for path in cut.training_folder.iterdir()) == ["data_report.json", "model", "train_log.jsonl"]


def test_the_seconds_before_an_interruption_count(cut):
    state = cut.checkpoints / "checkpoint-5" / "trainer_state.json"
    told = json.loads(state.read_text())
    told["log_history"] = [entry | {"train_seconds": 1000.0} if "train_seconds" in entry else entry for entry in told["log_history"]]
    state.write_text(json.dumps(told))
    seal(state.parent)
    save_training(cut, fine_tune(cut), 0.0, "pytest")
    assert 1000 < json.loads((Path(cut.trained) / "provenance.json").read_text())["train_seconds"] < 1100


def test_a_stage_that_was_done_is_not_trained_again_and_its_report_is_there(tmp_path):
    """Snakemake deletes data_report.json before it starts an interrupted job again."""
    method = {"name": "two", "stages": [{"rows": ["en"]}, {"rows": ["tgt"]}]}
    runs = [prepared(small(tmp_path / name, methods=[method]), "two") for name in ("whole", "cut")]
    save_training(runs[0], fine_tune(runs[0]), 0.0, "pytest")

    class Cut(Checkpoints):
        def on_save(self, args, state, control, **kwargs):
            super().on_save(args, state, control, **kwargs)
            if Path(args.output_dir).name == "stage2":
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dsft.training.Checkpoints", Cut)
        fine_tune(runs[1])
    (runs[1].training_folder / "data_report.json").unlink()
    save_training(runs[1], fine_tune(runs[1]), 0.0, "pytest")
    for name in ("data_report.json", "train_log.jsonl", "model/model.safetensors"):
        one, other = ((run.training_folder / name).read_bytes() for run in runs)
        assert one == other, name


def test_a_stage_model_whose_bytes_flip_is_not_gone_on_from(tmp_path):
    run = prepared(small(tmp_path, methods=[{"name": "two", "stages": [{"rows": ["en"]}, {"rows": ["tgt"]}]}], train=SMALL["train"] | {"max_steps": 1}), "two")

    class Cut(Checkpoints):
        def on_train_begin(self, args, state, control, **kwargs):
            super().on_train_begin(args, state, control, **kwargs)
            if Path(args.output_dir).name == "stage2":
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dsft.training.Checkpoints", Cut)
        fine_tune(run)
    SPOIL["flip"](run.checkpoints / "stage1-model" / "model.safetensors")
    with pytest.raises(ParamsError, match="stage1-model: model.safetensors is not what was written.*; delete the folder"):
        fine_tune(run)


# ---- exchanged under the same name


@pytest.fixture
def on_files(tmp_path) -> Study:
    """A study on files of its own with a base of its own."""
    shutil.copytree(tiny_base(), tmp_path / "base")
    for lang, (asked, said) in {"en": ("What is {}?", "That is {}."), "zh": ("什么是{}?", "那是{}。")}.items():
        write_json(tmp_path / f"{lang}.json", [{"id": n, "instruction": asked.format(n), "input": "", "output": said.format(n)} for n in range(8)])
    files = {lang: str(tmp_path / f"{lang}.json") for lang in ("en", "zh")}
    changes = {"models": {"m": {"path": str(tmp_path / "base")}}, "data": {"source": "files", "files": files}, "methods": ["tft", "dsft_feature", {"name": "more", "start": "tft"}]}
    return small(tmp_path / "runs", **changes, train=SMALL["train"] | {"max_steps": 1})


def exchange_base(study: Study) -> None:
    file = Path(study.base("m")) / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.5}))


def exchange_data(study: Study) -> None:
    file = Path(study.data.files["zh"].path)
    file.write_text(file.read_text().replace("那是", "这是"))


def test_layers_chosen_from_cloze_facts_belong_to_these_facts(on_files, tmp_path):
    """What select_layers writes down of its files is what a training compares them with."""
    for lang in ("en", "zh"):
        (tmp_path / f"{lang}.tsv").write_text("Prompt\tAns\nA <mask>\tB\n", encoding="utf-8")
    study = on_files.model_copy(update={"evaluation": on_files.evaluation.model_copy(update={"facts": f"{tmp_path}/{{lang}}.tsv"})})
    run = prepared(study)
    assert [file.name for file in study.layer_files("zh")][-2:] == ["en.tsv", "zh.tsv"]
    write_json(run.layers_file.with_name("layers_provenance.json"), {"files": contents(study.layer_files("zh"))})
    run.check_inputs()
    (tmp_path / "zh.tsv").write_text("Prompt\tAns\nA <mask>\tC\n", encoding="utf-8")
    with pytest.raises(ParamsError, match=r"layers.json: made from other inputs than are there now \(files\); delete it"):
        run.check_inputs()


@pytest.mark.parametrize(("exchange", "told"), [(exchange_base, "base_sha256"), (exchange_data, "files")])
def test_what_was_made_before_an_exchange_is_refused_by_hand(on_files, exchange, told):
    run = prepared(on_files)
    write_json(run.layers_file.with_name("layers_provenance.json"), {"base_sha256": digest(run.base), "files": run.data_files})
    save_training(run, fine_tune(run), 0.0, "pytest")
    run.check_inputs(), run.check_trained()
    exchange(on_files)
    with pytest.raises(ParamsError, match=rf"layers.json: made from other inputs than are there now \({told}\); delete it"):
        run.check_inputs()
    with pytest.raises(ParamsError, match=rf"model: made from other inputs than are there now \({told}\); delete it"):
        run.check_trained()


def test_settings_that_were_edited_after_the_training_are_named(on_files):
    run = prepared(on_files, "tft")
    save_training(run, fine_tune(run), 0.0, "pytest")
    edited = on_files.model_copy(update={"train": on_files.train.model_copy(update={"learning_rate": 0.5})}).run("m", "zh", "tft", 0)
    with pytest.raises(ParamsError, match=r"\(train\)"):
        edited.check_trained()


def test_data_that_are_edited_while_a_training_begins_stop_it(on_files, monkeypatch):
    run, tokenize = prepared(on_files, "tft"), sys.modules["dsft.training"].tokenize

    def edited(*args, **kwargs):
        exchange_data(on_files)
        return tokenize(*args, **kwargs)

    monkeypatch.setattr("dsft.training.tokenize", edited)
    with pytest.raises(ParamsError, match="an input was edited while this training went on; start it again"):
        fine_tune(run)
    assert not Path(run.trained).exists()


def test_the_record_of_a_model_tells_of_the_data_that_it_was_trained_on(on_files):
    run = prepared(on_files, "tft")
    before, trainer = run.data_files, fine_tune(run)
    exchange_data(on_files)
    save_training(run, trainer, 0.0, "pytest")
    assert json.loads((Path(run.trained) / "provenance.json").read_text())["inputs"]["files"] == before != run.data_files


def test_data_in_another_folder_are_the_same_data(on_files, tmp_path, monkeypatch):
    """A study that names its folder of data by ${NAME}, on another machine: nothing is refused, a training goes on from its checkpoints."""
    here, there = tmp_path / "here", tmp_path / "much" / "deeper" / "there"
    shutil.copytree(tmp_path, here, ignore=shutil.ignore_patterns("base", "runs", "here")), shutil.copytree(here, there)
    monkeypatch.setenv("DSFT_ELSEWHERE", str(here))
    named = {lang: table.model_copy(update={"path": f"${{DSFT_ELSEWHERE}}/{lang}.json"}) for lang, table in on_files.data.files.items()}
    run = prepared(on_files.model_copy(update={"data": on_files.data.model_copy(update={"files": named})}))
    write_json(run.layers_file.with_name("layers_provenance.json"), {"files": contents(run.study.layer_files("zh"))})
    save_training(run, fine_tune(run), 0.0, "pytest")
    files, checkpoints = run.data_files, run.checkpoints
    monkeypatch.setenv("DSFT_ELSEWHERE", str(there))
    assert run.data_files != files and run.checkpoints == checkpoints
    run.check_inputs(), run.check_trained()
    (there / "zh.json").write_text((there / "zh.json").read_text().replace("那是", "这是"))
    with pytest.raises(ParamsError, match=r"layers.json: made from other inputs than are there now \(files\); delete it"):
        run.check_inputs()
    with pytest.raises(ParamsError, match=r"model: made from other inputs than are there now \(files\); delete it"):
        run.check_trained()
    assert run.checkpoints != checkpoints


def test_an_edit_that_keeps_size_and_time_of_a_file_is_seen(on_files):
    file = Path(on_files.data.files["zh"].path)
    before, times = parallel_pairs(on_files.data, "zh")[0], file.stat()
    exchange_data(on_files)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size and file.stat().st_mtime_ns == times.st_mtime_ns
    after = parallel_pairs(on_files.data, "zh")[0]
    assert [pair.target["output"] for pair in after] == [pair.target["output"].replace("那是", "这是") for pair in before]


@pytest.mark.parametrize(("part", "changes"), [("train", {"learning_rate": 0.5}), ("evaluation", {"items": 7}), ("data", {"items": 8})])
def test_runs_of_another_time_are_not_counted(killed, part, changes):
    """As after the run folder came from another machine, without Snakemake's notes: nothing would be made again."""
    file = killed[0] / "undisturbed" / "small.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    check_records(load_study(file))
    try:
        file.write_text(yaml.safe_dump(content | {part: content[part] | changes}), encoding="utf-8")
        with pytest.raises(ParamsError, match=rf"seed0: made from other inputs than are there now \({part}\); delete it and have it made again"):
            check_records(load_study(file))
        with pytest.raises(SystemExit, match="dsft: .*seed0: made from other inputs"):
            headline(str(file))
    finally:
        file.write_text(yaml.safe_dump(content), encoding="utf-8")


def test_evaluations_that_ask_in_another_way_at_the_same_time_have_files_of_their_own(tmp_path):
    study = small(tmp_path)
    longer = study.model_copy(update={"evaluation": study.evaluation.model_copy(update={"max_new_tokens": 99})})
    folders = [write_tasks(*asked)[0].folder for asked in ((study, "zh", ""), (study, "zh", " "), (longer, "zh", ""), (study, "zh", ""))]
    assert len(set(folders)) == 3 and folders[0] == folders[3]


# ---- answers


def test_answers_are_asked_again_where_their_file_is_not_what_was_written(tmp_path, capfd):
    file, prompts, asked = tmp_path / "answers.jsonl", [f"{n}" * (n + 1) for n in range(6)], []

    def answer(batch: list[str]) -> list[str]:
        asked.append(batch)
        return [f"<{prompt}>" for prompt in batch]

    whole = resumable_map(file, prompts, answer, 2, "")
    lines = file.read_text(encoding="utf-8").splitlines()
    for spoilt in (lines[3].replace("<3", "<7"), "\0" * 20, lines[3][:-5], '{"n": 3, "answer": "<3333>"}', "\udcff"):
        file.write_bytes("\n".join([*lines[:3], spoilt, *lines[4:], ""]).encode("utf-8", "surrogateescape"))
        asked.clear(), capfd.readouterr()
        assert resumable_map(file, prompts, answer, 2, "") == whole
        assert asked == [prompts[2:4]]  # the whole batch, so that its padding is the same
        assert f"{file}: line 4 is not as it was written" in capfd.readouterr().err


# ---- written


def raising(error: Exception) -> Callable:
    def write(*args, **kwargs):
        raise error

    return write


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("what", ["model", "optimizer", "seal"])
def test_a_full_disk_while_a_checkpoint_is_written_is_one_line_and_training_goes_on_later(tmp_path, interrupted, what):
    run = prepared(small(tmp_path))
    failing = {"model": "transformers.Trainer.save_model", "optimizer": "torch.save", "seal": "dsft.training.seal"}[what]
    error = {"model": RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "optimizer": RuntimeError("PytorchStreamWriter failed writing file data/0")}

    class Late(Checkpoints):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:  # in the fourth step
                patch.setattr(failing, raising(error.get(what, FULL)))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ParamsError, match=r"checkpoints-\w+: cannot be written: the disk is full; free some space, then start again"):
        patch.setattr("dsft.training.Checkpoints", Late)
        fine_tune(run)
    assert last_complete_checkpoint(run.checkpoints) == str(run.checkpoints / "checkpoint-3")
    save_training(run, fine_tune(run), 0.0, "pytest")
    assert weights(run) == interrupted[1]


def test_a_full_disk_while_the_model_is_saved_leaves_no_model(tmp_path):
    run = prepared(small(tmp_path, train=SMALL["train"] | {"max_steps": 1}))
    trainer = fine_tune(run)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ParamsError, match="model: cannot be written: the disk is full"):
        patch.setattr("dsft.training.seal", raising(FULL))
        save_training(run, trainer, 0.0, "pytest")
    assert not Path(run.trained).exists() and not list(run.training_folder.glob(".model*"))
    save_training(run, trainer, 0.0, "pytest")
    assert damage(run.trained) == ""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_result_that_cannot_be_written_is_one_line_and_the_old_one_stays(tmp_path, monkeypatch, number):
    file = tmp_path / "metrics.json"
    write_json(file, {"f1": 50})
    monkeypatch.setattr(Path, "write_text", raising(OSError(number, os.strerror(number))))
    with pytest.raises(ParamsError) as told:
        write_json(file, {"f1": 51})
    assert str(told.value).startswith(f"{file}: cannot be written: ") and "\n" not in str(told.value)
    assert json.loads(file.read_text()) == {"f1": 50} and [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "metrics.json"):
        1 / 0  # noqa: B018


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 1 MB; skips the test where none may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no disk may be mounted here")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_on_a_disk_that_is_too_small_a_training_says_so(small_disk):
    run = prepared(small(small_disk))
    with pytest.raises(ParamsError, match=r"checkpoints-\w+: cannot be written: the disk is full"):
        fine_tune(run)
    assert last_complete_checkpoint(run.checkpoints) is None and not Path(run.trained).exists()


def test_on_a_disk_that_is_full_or_may_only_be_read_nothing_is_begun(small_disk, monkeypatch):
    (small_disk / "study.yaml").write_text(yaml.safe_dump(SMALL | {"runs": str(small_disk / "runs"), "figures": str(small_disk / "figures")}), encoding="utf-8")
    with pytest.raises(SystemExit, match="dsft: runs: the disk of .* is full"):
        check(str(small_disk / "study.yaml"))
    monkeypatch.setattr("dsft.checks.LEAST_FREE", 0)
    check(str(small_disk / "study.yaml"))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(SystemExit, match="dsft: runs: nothing can be written to .*read-only file system"):
        check(str(small_disk / "study.yaml"))
    with pytest.raises(ParamsError, match="the file system is read-only"):
        write_json(small_disk / "metrics.json", {})
    with pytest.raises(ParamsError, match="the file system is read-only"):
        hold(small_disk / "train")


@pytest.mark.parametrize("room", [2**12, 2**19])  # for no weights, and for weights but not for what the optimizer keeps
def test_a_file_larger_than_allowed_is_one_line(tmp_path, room):
    run, before = prepared(small(tmp_path)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(ParamsError, match=r"checkpoints-\w+.*: cannot be written: .*then start again"):
            fine_tune(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert last_complete_checkpoint(run.checkpoints) is None and not Path(run.trained).exists()


def test_a_file_where_the_runs_should_be_is_one_line(tmp_path):
    (tmp_path / "runs").write_text("")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(SMALL | {"runs": str(tmp_path / "runs"), "figures": str(tmp_path / "figures")}), encoding="utf-8")
    with pytest.raises(SystemExit, match="dsft: runs: .*runs is a file; move it away, or set runs to another folder"):
        check(str(tmp_path / "study.yaml"))
    with pytest.raises(ParamsError, match="a file stands where a folder should be"):
        write_jsonl(tmp_path / "runs" / "study" / "samples.jsonl", [])


# ---- two at once


def test_the_same_run_is_not_made_twice_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("dsft.files.PATIENCE", 0.1)
    study = small(tmp_path)
    run, edited = (prepared(s) for s in (study, study.model_copy(update={"train": study.train.model_copy(update={"learning_rate": 0.5})})))
    for notebook in ("select_layers", "recipe_rows", "train", "evaluate"):
        lock = run.alone(notebook)
        for other in (run, edited):  # whatever the study says meanwhile, the result has the same name
            with pytest.raises(ParamsError, match=f"{notebook}: another process is at work on it .*; wait for it or stop it"):
                other.alone(notebook)
        study.run("m", "zh", "base", 0).alone("evaluate").release()  # another run
        lock.release()
        run.alone(notebook).release()


def test_a_lock_falls_with_its_process(tmp_path):
    code = f"import time; from dsft.files import hold; lock = hold({str(tmp_path / 'train')!r}); print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ParamsError):
            hold(tmp_path / "train", patience=0)
        holder.kill()
    hold(tmp_path / "train").release()


def test_every_notebook_of_the_experiments_is_alone():
    for notebook in (ROOT / "nbs" / "experiments").glob("*.ipynb"):
        code = python_code(notebook)
        assert re.search(r"^alone = (run\.alone|hold)\(", code, re.MULTILINE) and code.rstrip().split("alone.release()")[-1].count("\n") <= 2, notebook.name


# ---- a study file of a stranger

STRANGE = [
    ({"runs": "../../etc"}, "runs = '../../etc': must lie in runs/ or figures/"),
    ({"runs": "/etc"}, "runs = '/etc': must lie in"),
    ({"runs": "."}, "runs = '.': must lie in"),
    ({"runs": ""}, "runs = '': must lie in"),
    ({"runs": "runs/../nbs"}, "runs = 'runs/../nbs': must lie in"),
    ({"figures": ".git/figures"}, "figures = '.git/figures': must lie in"),
    ({"figures": "~/figures"}, "figures = '~/figures': must lie in"),
    ({"name": "../study"}, "name"),
    ({"name": ".."}, "name"),
    ({"models": {"../base": {"path": "models/micro-llama"}}}, "models"),
    ({"models": {"a/b": {"path": "models/micro-llama"}}}, "models"),
    ({"models": {"..": {"path": "models/micro-llama"}}}, "models"),
    ({"models": {"": {"path": "models/micro-llama"}}}, "models"),
    ({"models": {"m": {"path": "../elsewhere", "pretrain": {}}}}, "models.m.path = '../elsewhere': must lie in models/"),
    ({"models": {"m": {"path": "models", "pretrain": {}}}}, "models.m.path = 'models': must lie in models/"),
    ({"models": {"m": {"path": "nbs/base", "pretrain": {}}}}, "models.m.path = 'nbs/base': must lie in models/"),
    ({"models": {"m": {"path": "nbs/base", "gguf": "models/m.gguf"}}}, "models.m.path = 'nbs/base': must lie in models/"),
    ({"models": {"m": {"path": "${HOME}/base", "gguf": "models/m.gguf"}}}, "must lie in models/"),
    ({"languages": ["../zh"]}, "languages"),
    ({"methods": [{"name": "../tft"}]}, "methods"),
    ({"methods": [{"name": "a/b"}]}, "methods"),
    ({"methods": [{"name": "a", "start": "../tft"}]}, "methods"),
    ({"extends": "../../etc/passwd"}, "no such study"),
    ({"evaluation": {"backend_args": {"trust_remote_code": True}}}, "`backend_args` must not set trust_remote_code"),
    ({"evaluation": {"backend_args": {"pretrained": "other/model"}}}, "`backend_args` must not set pretrained"),
]


@pytest.mark.parametrize(("changes", "told"), STRANGE)
def test_a_place_outside_of_the_results_is_refused_in_one_line(tmp_path, changes, told):
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(SMALL | changes), encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ParamsError) as refused:
        load_study(file)
    assert told in str(refused.value) and "\n" not in str(refused.value) and "study.yaml" in str(refused.value) + "study.yaml" * (told == "no such study")
    with pytest.raises(SystemExit, match="^dsft: "):
        check(str(file))
    assert sorted(tmp_path.rglob("*")) == before


def test_places_for_results_are_fine(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")  # on another disk, as its user wants it
    for changes in ({"runs": "runs/rehearsal", "figures": "runs/rehearsal/figures"}, {"runs": str(tmp_path / "runs")}, {"models": {"m": {"path": "models/mine", "pretrain": {}}}}):
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(SMALL | changes), encoding="utf-8")
        load_study(tmp_path / "study.yaml")


def test_a_yaml_tag_makes_no_object(tmp_path):
    (tmp_path / "study.yaml").write_text(f"models: !!python/object/apply:os.system ['touch {tmp_path}/owned']\n", encoding="utf-8")
    with pytest.raises(ParamsError, match="not readable as YAML"):
        load_study(tmp_path / "study.yaml")
    assert not (tmp_path / "owned").exists()


class Evil:
    """What runs a command when it is unpickled."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.system, (f"touch {self.place}",)


def test_a_pickle_in_a_model_folder_is_not_loaded(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base(), base)
    (base / "model.safetensors").unlink()
    with (base / "pytorch_model.bin").open("wb") as file:
        torch.save({"lm_head.weight": Evil(tmp_path / "owned")}, file)
    run = prepared(small(tmp_path / "runs", models={"m": {"path": str(base)}}, methods=["tft"]), "tft")
    with pytest.raises(ParamsError, match="not readable as a model"):
        fine_tune(run)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_is_not_loaded(cut, name):
    checkpoint = cut.checkpoints / "checkpoint-5"
    torch.save({"state": Evil(cut.checkpoints / "owned")}, checkpoint / name)
    seal(checkpoint)  # by who put it there
    with pytest.raises(pickle.UnpicklingError):
        fine_tune(cut)
    assert not (cut.checkpoints / "owned").exists()


# ---- the code itself


@cache
def sources() -> list[tuple[str, ast.Module]]:
    """Name and syntax tree of every module, notebook and test."""
    paths = sorted((*ROOT.glob("dsft/**/*.py"), *ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("tests/*.py")))
    return [(str(path.relative_to(ROOT)), ast.parse(python_code(path))) for path in paths if ".ipynb_checkpoints" not in path.parts and path.name != "_modidx.py"]


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_no_pickle_no_remote_code_no_shell():
    for name, tree in sources():
        test = name.startswith("tests/")
        for called, node in calls(tree):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in ("torch.load", "pickle.load", "pickle.loads", "joblib.load", "pd.read_pickle", "dill.load", "os.popen", "yaml.unsafe_load"), f"{name}: {called}"
            assert called not in ("eval", "exec") or name == "tests/test_analysis.py", f"{name}: {called}"  # it runs a part of the Snakefile
            assert called != "os.system" and given.get("shell") != "True", f"{name}: a shell"
            assert given.get("trust_remote_code", "False") == "False" and given.get("allow_pickle", "False") == "False", f"{name}: {ast.unparse(node)[:100]}"
            assert called != "yaml.load" or "_StrictLoader" in ast.unparse(node) or (test and "yaml.BaseLoader" in ast.unparse(node)), f"{name}: {ast.unparse(node)[:100]}"
            assert test or not called.startswith("pickle."), f"{name}: {called}"
    snakefile = (ROOT / "Snakefile").read_text(encoding="utf-8")
    assert not re.search(r"pickle|torch\.load|trust_remote_code|os\.system|shell\s*=\s*True", snakefile)


WRITES = ("write_text", "write_bytes", "to_csv", "to_parquet", "to_json", "savefig", "save_pretrained", "save_file", "dump", "save")


def unprotected(tree: ast.AST, protected: bool = False) -> Iterator[str]:
    """What is written in code outside of `replacing` and temporary folders."""
    if isinstance(tree, (ast.With, ast.AsyncWith)):
        entered = " ".join(ast.unparse(item.context_expr) for item in tree.items)
        protected = protected or "replacing(" in entered or "TemporaryDirectory(" in entered
    if isinstance(tree, ast.Call) and not protected:
        name = tree.func.attr if isinstance(tree.func, ast.Attribute) else getattr(tree.func, "id", "")
        mode = next((ast.unparse(argument) for argument in [*tree.args[:2], *(k.value for k in tree.keywords if k.arg == "mode")] if re.fullmatch(r"'[wax]\+?[bt]?'", ast.unparse(argument))), "")
        if name in WRITES or (name == "open" and mode):
            yield ast.unparse(tree)[:100]
    for child in ast.iter_child_nodes(tree):
        yield from unprotected(child, protected)


def test_every_result_cache_and_figure_is_written_whole_or_not_at_all():
    exported = {name: tree for name, tree in sources() if name.startswith(("dsft/", "nbs/experiments/", "nbs/analysis/"))}
    found = {f"{name}: {call}" for name, tree in exported.items() for call in unprotected(tree)}
    assert found == {
        "dsft/generation.py: file.open('a', encoding='utf-8')",  # line by line, each with its checksum
        "dsft/kernels.py: open(self.orders, 'w')",  # a pipe
        "dsft/gguf_models.py: target.open('wb')",  # a name of `replacing`
        "dsft/weights.py: AutoTokenizer.from_pretrained(run.base).save_pretrained(folder)",  # a folder of `replacing`, as the next
        "dsft/weights.py: model.save_pretrained(folder)",
        "dsft/kernels.py: json.dump({'arguments': arguments, 'env': env or dict(os.environ), 'cwd': cwd}, orders)",
    }


def test_a_kill_while_a_folder_is_replaced_leaves_the_old_or_the_new_one(tmp_path):
    """At each of the three steps of a replacement; what is left beside it is cleared away later."""
    code = """
import os, sys
from pathlib import Path
from dsft import files
step, count = int(sys.argv[2]), 0
def cut(function):
    def stop(*args, **kwargs):
        global count
        count += 1
        if count == step: os.kill(os.getpid(), 9)
        return function(*args, **kwargs)
    return stop
Path.rename, files.shutil.rmtree = cut(Path.rename), cut(files.shutil.rmtree)
with files.replacing(Path(sys.argv[1], "model")) as folder:
    folder.mkdir()
    (folder / "weights").write_text("new")
"""
    for step in (1, 2, 3):
        folder = tmp_path / str(step)
        with replacing(folder / "model") as temporary:
            temporary.mkdir()
            (temporary / "weights").write_text("old")
        assert subprocess.run([sys.executable, "-c", code, folder, str(step)], cwd=ROOT).returncode == -9
        there = [path.read_text() for path in folder.glob("model/weights")]
        assert there == {1: ["old"], 2: [], 3: ["new"]}[step]
        with exclusive(folder / "model"):
            clear_temporary(folder / "model")
        assert sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock")) == (["model"] if there else [])


# ---- audit


@pytest.mark.parametrize(
    ("said", "code", "told"),
    [
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}', 0, "audit: 0 known vulnerabilities in 1 pinned packages"),
        ('{"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "X-1", "fix_versions": ["2"]}]}]}', 1, "a 1: X-1, mended in 2"),
        ("", 0, "audit: not done, pip-audit could not ask for vulnerabilities"),
    ],
)
def test_an_audit_fails_for_findings_only(tmp_path, capsys, said, code, told):
    from audit import audit

    program = tmp_path / "pip-audit"
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    assert audit(str(program)) == code
    assert told in capsys.readouterr().out
