"""A tiny model, tiny parallel data and a short training run, shared by the tests of the trainer."""

from dataclasses import replace

import datasets
import pytest
import torch
import transformers

from dsft.methods import METHODS, Supervision
from dsft.trainer import DSFTTrainer

LAYERS = 4
SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
SUPERVISIONS = {
    "tft": (),
    "logits": METHODS["dsft_logits"].at(1, 2),
    "feature": METHODS["dsft_feature"].at(1, 2),
    "mixed": (
        *(replace(s, weight=0.5) for s in METHODS["dsft_logits"].at(1, 3)),
        *METHODS["dsft_feature"].at(1, 2),
        Supervision(stage="et", kind="logits", layer=LAYERS, alignment="positional", update_head=True),
    ),
}
# What runs on two processes: supervisions and variant of the model.
DISTRIBUTED = {
    "ddp": (("mixed", "plain"), ("logits", "lora")),
    "fsdp2": (("mixed", "plain"), ("logits", "tied, checkpointing"), ("logits", "lora")),
}


def model(tied: bool = False) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, num_hidden_layers=LAYERS, tie_word_embeddings=tied)
    )


def variant(name: str):
    """The model as it is, or tied, or with LoRA adapters."""
    if name != "lora":
        return model(tied="tied" in name)
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(model(), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))


def data(n: int = 40) -> datasets.Dataset:
    g = torch.Generator().manual_seed(1)
    ids = lambda low, high: torch.randint(3, 97, (int(torch.randint(low, high, (1,), generator=g)),), generator=g).tolist()
    rows = [dict(id=str(i), x_tgt=ids(3, 14), y_tgt=ids(1, 12), x_en=ids(2, 13), y_en=ids(1, 10)) for i in range(n)]
    return datasets.Dataset.from_list(rows)


def trainer(output_dir, supervisions="logits", eval_dataset=None, callbacks=None, lm=None, gradient_norm_steps=0, **arguments) -> DSFTTrainer:
    """Five SGD steps on 8 examples each (with SGD an error of a gradient stays as large in the weights); `supervisions` themselves or a name of SUPERVISIONS."""
    defaults = dict(
        per_device_train_batch_size=8,
        max_steps=5,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        dataloader_pin_memory=False,
    )
    args = transformers.TrainingArguments(str(output_dir), **{**defaults, **arguments})
    lm = model() if lm is None else lm
    given = dict(train_dataset=data(), eval_dataset=eval_dataset, callbacks=callbacks, gradient_norm_steps=gradient_norm_steps)
    return DSFTTrainer(lm, args, SUPERVISIONS.get(supervisions, supervisions), **given)


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
