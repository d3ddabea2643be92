"""What torchrun starts in test_distributed.py: DSFTTrainer on 2 examples x 2 accumulation steps in each of two processes."""

import os
import sys

import tiny
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

FSDP2 = dict(
    ACCELERATE_USE_FSDP="true",
    FSDP_VERSION="2",
    FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
    FSDP_RESHARD_AFTER_FORWARD="true",
    FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
    FSDP_CPU_RAM_EFFICIENT_LOADING="false",
)


def let_accelerate_shard_on_cpu() -> None:
    """accelerate knows FSDP2 on GPUs only and falls back to DDP elsewhere; torch's FSDP2 itself runs on CPU over gloo."""
    os.environ.update(FSDP2)
    init = AcceleratorState.__init__

    def init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init_with_fsdp


def main(engine: str, supervisions: str, variant: str, out: str) -> None:
    if engine == "fsdp2":
        let_accelerate_shard_on_cpu()
    arguments = dict(
        per_device_train_batch_size=2, gradient_accumulation_steps=2, gradient_checkpointing=variant == "tied, checkpointing"
    )
    trainer = tiny.trainer(os.path.dirname(out), supervisions, lm=tiny.variant(variant), **arguments)
    trainer.train()
    wrapped = {"ddp": DistributedDataParallel, "fsdp2": FSDPModule}[engine]
    assert torch.distributed.get_world_size() == 2 and isinstance(trainer.model_wrapped, wrapped), type(trainer.model_wrapped)
    trainer.export(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # after the wrapped model is gone: it hangs now and then the other way round
