"""Two processes over gloo give the weights of one: DDP and FSDP2, under transformers' Trainer and the engines' own launchers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import dsft.training
from dsft.study import load_study

HERE = Path(__file__).parent
SETTINGS = HERE.parent / "params" / "accelerate" / "one_node.yaml"  # FSDP2 as the project ships it, here for two CPU processes in fp32
LAUNCH = {
    "ddp": ("torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    "fsdp2": ("accelerate.commands.launch", f"--config_file={SETTINGS}", "--num_processes=2", "--mixed_precision=no", "--main_process_port=0"),
}


def launch(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=300)


def write_study(folder: Path, base: Path) -> Path:
    """A study of one short run of DSFT-logits from `base`, with its critical layers."""
    study = {
        "runs": str(folder / "runs"),
        "models": {"tiny": {"path": str(base)}},
        "languages": ["zh"],
        "methods": ["dsft_logits"],
        "seeds": [0],
        "data": {"items": 16, "max_length": 256},
        "train": {"epochs": 1, "batch_size": 8, "per_device_batch_size": 2, "logging_steps": 1, "save_steps": 2},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    layers = load_study(path).run("tiny", "zh", "dsft_logits", 0).layers_file
    layers.parent.mkdir(parents=True)
    layers.write_text(json.dumps({"i": 1, "j": 2}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A base model whose tokenizer knows bytes only."""
    folder = tmp_path_factory.mktemp("base")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE({c: n for n, c in enumerate(["</s>", *letters])}, []))
    bytes_only.pre_tokenizer, bytes_only.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="</s>").save_pretrained(folder)
    lm = tiny.model()
    lm.resize_token_embeddings(257)
    lm.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def on_two(tmp_path_factory, base):
    """engine -> the folder that its launcher left, with every case of the engine trained on two processes."""
    done = {}

    def folder(engine: str) -> Path:
        if engine not in done:
            done[engine] = tmp_path_factory.mktemp(engine)
            write_study(done[engine], base)
            run = launch(*LAUNCH[engine], str(HERE / "distributed_worker.py"), engine, str(done[engine]))
            assert run.returncode == 0, run.stderr[-4000:]
        return done[engine]

    return folder


@pytest.mark.parametrize(("engine", "supervisions", "variant"), [(e, *case) for e, cases in tiny.DISTRIBUTED.items() for case in cases])
def test_two_processes_equal_one(tmp_path, on_two, engine, supervisions, variant):
    alone = tiny.trainer(tmp_path, supervisions, lm=tiny.variant(variant))
    alone.train()
    alone.export(tmp_path / "one")
    paths = (tmp_path / "one", on_two(engine) / f"{supervisions}, {variant}")
    one, two = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in paths)
    assert tiny.largest_difference(two, one) < 1e-6


@pytest.mark.parametrize("engine", LAUNCH)
def test_a_run_of_a_study_on_two_processes(tmp_path, base, on_two, engine):
    """`dsft.training.train`, which the launchers start on every process, leaves one complete model folder."""
    saved, alone = [], write_study(tmp_path, base)
    dsft.training.train(str(alone))
    for path in (on_two(engine) / "study.yaml", alone):
        run = load_study(path).run("tiny", "zh", "dsft_logits", 0)
        assert sorted(p.name for p in run.training_folder.iterdir()) == [".train.lock", "data_report.json", "model", "train_log.jsonl"]
        saved.append(AutoModelForCausalLM.from_pretrained(run.trained).state_dict())
    assert tiny.largest_difference(*saved) < 1e-4  # AdamW's first steps are signs: rounding counts where a gradient is almost 0


def test_accelerates_fallback_to_one_process_is_an_error(tmp_path, monkeypatch):
    """With --cpu, `accelerate launch --num_processes 2` starts one process and says nothing: in the environment set here."""
    arguments = launch_command_parser().parse_args(["--cpu", "--num_processes=2", "script.py"])
    command, environment = prepare_simple_launcher_cmd_env(_validate_launch_command(arguments)[0])
    assert command[-1] == "script.py"
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="only one process runs"):
        tiny.trainer(tmp_path)
