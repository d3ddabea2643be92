"""What test_distributed.py starts on two processes: DSFTTrainer on 2 examples x 2 accumulation steps in each, case after case."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

import dsft.training

WRAPPED = {"ddp": DistributedDataParallel, "fsdp2": FSDPModule}


def let_accelerate_shard_on_cpu() -> None:
    """accelerate knows FSDP2 on GPUs only and falls back to DDP elsewhere; torch's FSDP2 itself runs on CPU over gloo."""
    init = AcceleratorState.__init__

    def init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init_with_fsdp


def train(engine: str, supervisions: str, variant: str, out: Path) -> None:
    arguments = dict(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, gradient_checkpointing=variant == "tied, checkpointing"
    )
    trainer = tiny.trainer(out.parent, supervisions, lm=tiny.variant(variant), **arguments)
    trainer.train()
    assert torch.distributed.get_world_size() == 2 and isinstance(trainer.model_wrapped, WRAPPED[engine]), type(trainer.model_wrapped)
    trainer.export(out)


def balance(engine: str, folder: Path) -> None:
    """Each process measures a batch of its own, and all weigh by their mean; where no process has a whole gradient, this is refused."""
    supervisions = tuple(replace(s, weight="balanced") for s in tiny.SUPERVISIONS["logits"])
    if engine == "fsdp2":
        with pytest.raises(ValueError, match="weight = balanced under FSDP"):
            tiny.trainer(folder, supervisions)
        return
    trainer = tiny.trainer(folder, supervisions, per_device_train_batch_size=4, max_steps=2)
    trainer.train()
    weights = trainer.accelerator.gather(torch.tensor([[t.weight for t in trainer.terms]]))
    assert len(weights) == 2 and torch.equal(weights[0], weights[1]) and not (weights[0, 1:] == 1).any()


def main(engine: str, folder: Path) -> None:
    if engine == "fsdp2":
        with pytest.raises(RuntimeError, match="FSDP was asked for, but accelerate runs MULTI_CPU"):
            tiny.trainer(folder)
        let_accelerate_shard_on_cpu()
    for supervisions, variant in tiny.DISTRIBUTED[engine]:
        train(engine, supervisions, variant, folder / f"{supervisions}, {variant}")
    balance(engine, folder / "balanced")
    dsft.training.train(str(folder / "study.yaml"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # after the wrapped model is gone: it hangs now and then the other way round
