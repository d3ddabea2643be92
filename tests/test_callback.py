"""BenchmarkCallback: its scores are lm-eval's, reach the log, keep the best checkpoint, and leave the training as it is, to the bit."""

import random

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from dsft.benchmark_callback import BenchmarkCallback
from dsft.data import load_parallel, tokenize
from dsft.files import ParamsError
from dsft.methods import METHODS
from dsft.settings import DataParams, EvalParams
from dsft.study import load_study
from dsft.tasks import write_tasks
from dsft.trainer import DSFTTrainer

BASE = ROOT / "models" / "micro-llama"
SCORES = ("eval_xcopa_zh_acc", "eval_xquad_zh_f1")


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def examples(tokenizer):
    return tokenize(load_parallel(DataParams(items=48), "zh"), tokenizer, 256)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    evaluation = EvalParams(benchmarks=("xcopa", "xquad"), items=10, max_new_tokens=6)
    return write_tasks(load_study("micro").model_copy(update={"runs": str(tmp_path_factory.mktemp("runs")), "evaluation": evaluation}), "zh")


def make(folder, examples, tokenizer, lora=False, **arguments) -> DSFTTrainer:
    given = dict(max_steps=4, per_device_train_batch_size=8, learning_rate=1e-3, logging_steps=2, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, seed=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attention_dropout=0.2)  # so that random numbers matter
    if lora:
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.2, target_modules="all-linear"))
    args = transformers.TrainingArguments(str(folder), **given | arguments)
    trainer = DSFTTrainer(model, args, METHODS["dsft_logits"].at(2, 6), train_dataset=examples, eval_dataset=examples.select(range(8)), processing_class=tokenizer)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def logged(trainer, name: str) -> dict[int, float]:
    return {log["step"]: log[name] for log in trainer.state.log_history if name in log}


@pytest.mark.parametrize("lora", [False, True])
def test_the_weights_are_those_of_a_training_without_it(tmp_path, examples, tokenizer, tasks, lora):
    trainers = []
    for with_it in (True, False):
        trainers.append(make(tmp_path, examples, tokenizer, lora))  # sets the seed
        if with_it:
            trainers[0].add_callback(BenchmarkCallback(trainers[0], tasks, every=1, limit=3, at_start=True))
        trainers[-1].train()
    watched, alone = trainers
    assert all(list(logged(watched, name)) == [0, 1, 2, 3, 4] for name in SCORES)
    for (name, a), (_, b) in zip(watched.model.named_parameters(), alone.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in trainers]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert watched.processing_class.pad_token == alone.processing_class.pad_token


def test_random_numbers_and_modes_are_as_they_were(tmp_path, examples, tokenizer, tasks):
    trainer = make(tmp_path, examples, tokenizer)
    callback = BenchmarkCallback(trainer, tasks[:1], every=1, limit=2)
    trainer.model.train()
    trainer.model.model.layers[1].eval()
    modes = [module.training for module in trainer.model.modules()]
    draw = lambda: (random.random(), np.random.rand(), torch.rand(1).item())
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = draw()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    callback._ask()
    assert draw() == expected and [module.training for module in trainer.model.modules()] == modes
    assert all(p.grad is None for p in trainer.model.parameters())


def test_the_scores_are_those_of_lm_eval(tmp_path, examples, tokenizer, tasks):
    trainer = make(tmp_path, examples, tokenizer, max_steps=2)
    callback = BenchmarkCallback(trainer, tasks, every=2)
    trainer.add_callback(callback)
    trainer.train()
    found = simple_evaluate(HFLM(pretrained=trainer.model.eval(), tokenizer=tokenizer, batch_size=1), tasks=[t.name for t in tasks], task_manager=callback.manager, bootstrap_iters=0)["results"]
    assert logged(trainer, SCORES[0]) == {2: pytest.approx(found["xcopa_zh"]["acc,none"])}
    assert logged(trainer, SCORES[1]) == {2: pytest.approx(found["xquad_zh"]["f1,none"])}


@pytest.mark.parametrize("every", [None, 2])
def test_the_best_checkpoint_by_a_benchmark(tmp_path, examples, tokenizer, tasks, every):
    keep = dict(eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model=SCORES[0], greater_is_better=False)
    trainer = make(tmp_path, examples, tokenizer, max_steps=6, **keep)
    trainer.add_callback(BenchmarkCallback(trainer, tasks[:1], every))
    trainer.train()
    scores = logged(trainer, SCORES[0])
    best = min(scores, key=lambda step: (scores[step], step))
    assert list(scores) == [2, 4, 6] and trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    kept = transformers.AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), kept.parameters(), strict=True))


def test_a_callback_sees_what_is_logged(tmp_path, examples, tokenizer, tasks):
    """report_to is a callback on the log."""
    seen = []

    class Seen(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append((state.global_step, dict(logs)))

    trainer = make(tmp_path, examples, tokenizer, max_steps=2)
    trainer.add_callback(Seen())
    trainer.add_callback(BenchmarkCallback(trainer, tasks[:1], every=1, limit=2))
    trainer.train()
    assert [step for step, logs in seen if SCORES[0] in logs] == [1, 2]


def test_wrong_use_is_told_in_one_line(tmp_path, examples, tokenizer, tasks):
    trainer = make(tmp_path, examples, tokenizer)
    with pytest.raises(ParamsError, match="there is no task 'xcopa_tlh'"):
        BenchmarkCallback(trainer, ["xcopa_tlh"], include_path=tasks[0].folder)
    assert BenchmarkCallback(trainer, [tasks[0].name], include_path=tasks[0].folder).names == ["xcopa_zh"]
    trainer.processing_class = None
    with pytest.raises(ParamsError, match="has no tokenizer"):
        BenchmarkCallback(trainer, tasks)
