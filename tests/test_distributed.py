"""Two processes over gloo give the weights of one: DDP and FSDP2, each under transformers' Trainer and torchrun."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dsft.params import load_params

WORKER = os.path.join(os.path.dirname(__file__), "distributed_worker.py")


def torchrun(*program: str, processes: int = 2) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *program]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    ("engine", "supervisions", "variant"),
    [
        ("ddp", "mixed", "plain"),
        ("ddp", "logits", "lora"),
        ("fsdp2", "mixed", "plain"),
        ("fsdp2", "logits", "tied, checkpointing"),
        ("fsdp2", "logits", "lora"),
    ],
)
def test_two_processes_equal_one(tmp_path, engine, supervisions, variant):
    torchrun(WORKER, engine, supervisions, variant, str(tmp_path / "two"))
    alone = tiny.trainer(tmp_path, supervisions, lm=tiny.variant(variant))
    alone.train()
    alone.export(tmp_path / "one")
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    assert tiny.largest_difference(two, one) < 1e-6


def test_a_run_of_a_study_on_two_processes(tmp_path):
    """`python -m dsft.trainer`, which accelerate launch starts on every process, leaves one complete model folder."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE({c: n for n, c in enumerate(["</s>", *letters])}, []))
    bytes_only.pre_tokenizer, bytes_only.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="</s>").save_pretrained(tmp_path / "base")
    lm = tiny.model()
    lm.resize_token_embeddings(257)
    lm.save_pretrained(tmp_path / "base")
    study = {
        "models": {"tiny": {"path": str(tmp_path / "base")}},
        "languages": ["zh"],
        "methods": ["dsft_logits"],
        "seeds": [0],
        "data": {"items": 16, "max_length": 64},
        "train": {"epochs": 1, "batch_size": 8, "per_device_batch_size": 2, "logging_steps": 1, "save_steps": 2},
    }
    saved = []
    for processes in (1, 2):
        path = tmp_path / f"on{processes}.yaml"
        path.write_text(yaml.safe_dump(study | {"runs": str(tmp_path / f"runs{processes}")}), encoding="utf-8")
        run = load_params(path).run("tiny", "zh", "dsft_logits", 0)
        run.layers_file.parent.mkdir(parents=True)
        run.layers_file.write_text(json.dumps({"i": 1, "j": 2}), encoding="utf-8")
        torchrun("-m", "dsft.trainer", str(path), processes=processes)
        assert sorted(p.name for p in run.training_folder.iterdir()) == ["model", "train_log.jsonl"]
        saved.append(AutoModelForCausalLM.from_pretrained(run.trained).state_dict())
    assert tiny.largest_difference(*saved) < 1e-4  # AdamW's first steps are signs: rounding counts where a gradient is almost 0
