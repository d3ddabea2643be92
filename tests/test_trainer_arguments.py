"""What transformers.Trainer and TrainingArguments can be told: each argument works with the losses or is refused by its name, at once and in one line."""

import dataclasses
import inspect
import os
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
import transformers
from accelerate import DistributedType
from conftest import ROOT
from datasets import Dataset
from torch.utils.data import IterableDataset

from dsft import trainer as dsft_trainer
from dsft.backbone import UnsupportedArchitecture
from dsft.data import TokenizedExample, collate
from dsft.losses import dsft_loss
from dsft.trainer import DSFTTrainer, row_limits

FIELDS = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
# What may be asked for without changing what is trained: the same losses and weights, to the bit.
SAME = {
    "torch_empty_cache_steps": {"torch_empty_cache_steps": 1},
    "auto_find_batch_size": {"auto_find_batch_size": True},
    "remove_unused_columns": {"remove_unused_columns": False},
    "skip_memory_metrics": {"skip_memory_metrics": False},
    "full_determinism": {"full_determinism": True},
    "dataloader_num_workers": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 1},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": "all"},
    "activation_checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "use_cache": {"use_cache": True},
    "debug": {"debug": "underflow_overflow"},
    "logging_nan_inf_filter": {"logging_nan_inf_filter": False},
    "average_tokens_across_devices": {"average_tokens_across_devices": False},  # in one process it is the same
    "enable_jit_checkpoint": {"enable_jit_checkpoint": True},
    "eval_on_start": {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1},
    "fp16_full_eval": {"fp16_full_eval": True},  # of evaluations after the training
    "bf16_full_eval": {"bf16_full_eval": True},
    "load_best_model_at_end": {
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss_et",
        "greater_is_better": False,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    },
    "save_only_model": {"save_only_model": True, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1},
}
REFUSED = {
    "label_smoothing_factor": {"label_smoothing_factor": 0.1},
    "label_names": {"label_names": ["labels"]},
    "torch_compile": {"torch_compile": True},
    "torch_compile_backend": {"torch_compile_backend": "eager"},
    "torch_compile_mode": {"torch_compile_mode": "default"},
    "use_liger_kernel": {"use_liger_kernel": True},
    "liger_kernel_config": {"use_liger_kernel": True, "liger_kernel_config": {"rope": True}},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
}
# Tested below or elsewhere under their own names ...
TESTED = set(
    "batch_eval_metrics bf16 data_seed deepspeed eval_accumulation_steps eval_do_concat_batches fp16 fsdp fsdp_config gradient_accumulation_steps include_for_metrics length_column_name "
    "logging_steps logging_strategy max_grad_norm max_steps num_train_epochs optim parallelism_config per_device_eval_batch_size per_device_train_batch_size prediction_loss_only "
    "train_sampling_strategy eval_strategy eval_steps eval_delay save_strategy save_steps save_total_limit gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing_kwargs "
    "greater_is_better metric_for_best_model dataloader_persistent_workers dataloader_prefetch_factor disable_tqdm".split()
)
# ... and those that stand before or behind the loss: the optimizer and its schedule, loading, logging, the hub, processes.
APART = set(
    "output_dir learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules tf32 logging_first_step "
    "log_on_each_node log_level log_level_replica report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id eval_use_gather_object save_on_each_node push_to_hub "
    "hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision ignore_data_skip restore_callback_states_from_checkpoint seed use_cpu accelerator_config "
    "dataloader_drop_last dataloader_pin_memory dataloader_multiprocessing_context dataloader_in_order ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph "
    "ddp_backend ddp_timeout do_train do_eval do_predict resume_from_checkpoint local_rank".split()
)
PARAMETERS = set(
    "self model args data_collator train_dataset eval_dataset processing_class model_init compute_loss_func compute_metrics callbacks optimizers optimizer_cls_and_kwargs "
    "preprocess_logits_for_metrics".split()
)


@pytest.fixture(autouse=True)
def _no_compiling_left_behind(monkeypatch):
    """TrainingArguments(torch_compile=...) writes into the environment, for everybody who comes later."""
    before = {name for name in os.environ if name.startswith("ACCELERATE_")}
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") and name not in before]:
        del os.environ[name]


def arguments(folder, **more) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False, **more)


def trained(folder, **more):
    trainer = tiny.trainer(folder, more.pop("supervisions", "logits"), eval_dataset=tiny.data(4), **{"max_steps": 2, **more})
    trainer.train()
    return trainer


def logged(trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def one_line(error) -> str:
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    return str(error.value)


def test_every_argument_has_been_thought_of():
    """A new version of transformers may bring new ones: try them, and put them where they belong."""
    assert FIELDS - set(SAME) - set(REFUSED) - TESTED - APART == set()
    assert set(inspect.signature(transformers.Trainer.__init__).parameters) - PARAMETERS == set()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("name", [name for name in SAME if name in FIELDS])
def test_what_is_trained_stays_the_same(tmp_path, plain, name):
    asked = trained(tmp_path, **SAME[name])
    assert logged(asked) == logged(plain)
    assert tiny.largest_difference(asked.model.state_dict(), plain.model.state_dict()) == 0


@pytest.mark.parametrize("name", [name for name in REFUSED if name in FIELDS])
def test_refused_by_name(tmp_path, name):
    with pytest.raises(ValueError, match="DSFTTrainer does not support") as error:
        tiny.trainer(tmp_path, **REFUSED[name])
    assert name.removesuffix("_backend").removesuffix("_mode").replace("liger_kernel_config", "use_liger_kernel") in one_line(error)


def test_a_loss_function_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not support compute_loss_func: ") as error:
        DSFTTrainer(tiny.model(), arguments(tmp_path), compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.logits.sum())
    one_line(error)


def test_what_needs_several_processes_or_engines_is_refused(tmp_path):
    several = {"world_size": 2, "average_tokens_across_devices": False, "label_names": None}
    nothing = dict.fromkeys(("label_smoothing_factor", "torch_compile", "use_liger_kernel", "neftune_noise_alpha", "deepspeed"))
    with pytest.raises(ValueError, match="average_tokens_across_devices = False"):
        dsft_trainer._refuse_bypassed(SimpleNamespace(**nothing | several), (), None)
    with pytest.raises(ValueError, match="deepspeed = 'zero3.json'"):
        dsft_trainer._refuse_bypassed(SimpleNamespace(**nothing | several | {"average_tokens_across_devices": True, "deepspeed": "zero3.json"}), (), None)
    accelerator = tiny.trainer(tmp_path).accelerator
    for size in ("tp_size", "cp_size", "sp_size"):
        sizes = SimpleNamespace(**{"tp_size": 1, "cp_size": 1, "sp_size": 1, size: 2})
        engine = mock.Mock(state=accelerator.state, distributed_type=DistributedType.NO, parallelism_config=sizes)
        with pytest.raises(ValueError, match=f"parallelism_config with {size} > 1"):
            dsft_trainer._refuse_engine(engine)


def test_a_launcher_that_compiles_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    with pytest.raises(ValueError, match="ACCELERATE_DYNAMO_BACKEND asks for it"):
        tiny.trainer(tmp_path)


def test_fp16_on_a_processor_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="fp16 was asked for, but accelerate computes in float32 on cpu"):
        tiny.trainer(tmp_path, fp16=True)


def _compiled_inside(model):
    model.model = torch.compile(model.model, backend="eager")
    return model


def _compiled_in_place(model):
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [lambda model: torch.compile(model, backend="eager"), _compiled_inside, _compiled_in_place], ids=["whole", "decoder", "in place"])
def test_a_compiled_model_is_refused(tmp_path, compiled):
    model = compiled(tiny.model())
    for use in (lambda: tiny.trainer(tmp_path, lm=model), lambda: dsft_loss(model, batch_of(tiny.data(2)), ())):
        with pytest.raises(UnsupportedArchitecture, match=r"LlamaForCausalLM cannot be served: it is compiled \(torch.compile\)") as error:
            use()
        one_line(error)


def test_neftune_works_without_supervisions(tmp_path):
    noisy, quiet = (logged(trained(tmp_path, supervisions="tft", **more)) for more in ({"neftune_noise_alpha": 5.0}, {}))
    assert noisy != quiet and noisy == pytest.approx(quiet, rel=0.1)


# ---- predictions
def batch_of(rows: Dataset) -> dict[str, torch.Tensor]:
    return collate([TokenizedExample(*(row[field] for field in TokenizedExample._fields)) for row in rows], 0)


@torch.no_grad()
def answers_alone(model, rows) -> list[tuple[list[int], torch.Tensor]]:
    """Of each row by itself the labels, and the model's own logits where they are predicted."""
    model.eval()
    return [(row["y_tgt"], model(torch.tensor([row["x_tgt"] + row["y_tgt"]])).logits[0, len(row["x_tgt"]) - 1 : -1]) for row in rows]


def assert_aligned(predictions: np.ndarray, labels: np.ndarray, model, rows) -> None:
    assert predictions.shape == labels.shape == (len(rows), max(map(len, rows["y_tgt"])))
    for said, wanted, (label, logits) in zip(predictions, labels, answers_alone(model, rows), strict=True):
        n = len(label)
        assert wanted.tolist() == label + [-100] * (len(wanted) - n)
        assert said.tolist() == logits.argmax(-1).tolist() + [-100] * (len(said) - n)


@pytest.mark.parametrize("supervisions", tiny.SUPERVISIONS)
@pytest.mark.parametrize(("batch", "more"), [(1, {}), (5, {}), (12, {"eval_accumulation_steps": 1}), (5, {"train_sampling_strategy": "group_by_length"})])
def test_metrics_get_predictions_of_each_example_in_its_place(tmp_path, supervisions, batch, more):
    rows, seen = tiny.data(12), []
    args = arguments(tmp_path, per_device_eval_batch_size=batch, **more)
    trainer = DSFTTrainer(tiny.model(), args, tiny.SUPERVISIONS[supervisions], eval_dataset=rows, compute_metrics=lambda p: seen.append(p) or {"n": len(p.predictions)})
    metrics = trainer.evaluate()
    assert metrics["eval_n"] == 12
    assert_aligned(seen[0].predictions, seen[0].label_ids, trainer.model, rows)
    assert metrics["eval_loss"] == pytest.approx(dsft_loss(trainer.model, batch_of(rows), tiny.SUPERVISIONS[supervisions], "naive")["loss"].item(), rel=1e-5)


@pytest.mark.parametrize("path", ["naive", "truncated", "one_pass"])
def test_predict(tmp_path, path):
    rows = tiny.data(7)
    trainer = DSFTTrainer(tiny.model(), arguments(tmp_path, per_device_eval_batch_size=3), tiny.SUPERVISIONS["logits"], path)
    output = trainer.predict(rows)
    assert_aligned(output.predictions, output.label_ids, trainer.model, rows)
    assert output.metrics["test_loss"] == pytest.approx(sum(output.metrics[f"test_loss_{name}"] for name in ("tft", "lc", "et")))
    assert DSFTTrainer(tiny.model(), arguments(tmp_path, prediction_loss_only=True)).predict(rows).predictions is None


def test_logits_for_metrics_are_the_models_own(tmp_path):
    """With a cap on the logits, too; of padding nothing is said."""
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**sizes, final_logit_softcapping=0.5)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    rows, shapes = tiny.data(6), []

    def keep_all(logits, labels):
        shapes.append((tuple(logits.shape), tuple(labels.shape)))
        return logits, logits.argmax(-1)

    trainer = DSFTTrainer(model, arguments(tmp_path, per_device_eval_batch_size=4), tiny.SUPERVISIONS["logits"], preprocess_logits_for_metrics=keep_all)
    (logits, said), labels, _ = trainer.predict(rows)
    assert [shape[0] for shape, _ in shapes] == [4, 2] and all(shape[:2] == other and shape[2] == 97 for shape, other in shapes)
    for n, (label, own) in enumerate(answers_alone(model, rows)):
        np.testing.assert_allclose(logits[n, : len(label)], own.numpy(), atol=1e-5)
        assert said[n, : len(label)].tolist() == own.argmax(-1).tolist() and (labels[n, len(label) :] == -100).all()


def test_only_token_ids_are_kept_of_an_evaluation(tmp_path):
    trainer = tiny.trainer(tmp_path)
    trainer._evaluated = torch.zeros(2, 3)
    loss, said, labels = trainer.prediction_step(trainer.model.eval(), batch_of(tiny.data(5)), False)
    assert said.dtype == labels.dtype == torch.int64 and said.shape == labels.shape and loss.ndim == 0


def test_batches_of_metrics(tmp_path):
    rows, calls = tiny.data(10), []

    def accuracy(p, compute_result):
        real = p.label_ids != -100
        calls.append((int((p.predictions == p.label_ids)[real].sum()), int(real.sum()), compute_result))
        right, n = (sum(call[k] for call in calls) for k in (0, 1))
        return {"accuracy": right / n} if compute_result else {}

    args = arguments(tmp_path, per_device_eval_batch_size=4, batch_eval_metrics=True)
    trainer = DSFTTrainer(tiny.model(), args, tiny.SUPERVISIONS["logits"], eval_dataset=rows, compute_metrics=accuracy)
    pairs = [(guess, label) for labels, logits in answers_alone(trainer.model, rows) for guess, label in zip(logits.argmax(-1).tolist(), labels)]
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(np.mean([guess == label for guess, label in pairs]))
    assert [last for *_, last in calls] == [False, False, True]


def test_batches_that_are_not_joined_and_what_metrics_may_ask_for(tmp_path):
    rows, seen = tiny.data(8), []
    args = arguments(tmp_path, per_device_eval_batch_size=4, eval_do_concat_batches=False, include_for_metrics=["inputs", "loss"])
    trainer = DSFTTrainer(tiny.model(), args, tiny.SUPERVISIONS["logits"], eval_dataset={"a": rows}, compute_metrics=lambda p: seen.append(p) or {})
    assert "eval_a_loss_lc" in trainer.evaluate()
    (p,) = seen
    assert [part.shape[0] for part in p.predictions] == [part.shape[0] for part in p.inputs] == [4, 4]
    prompts = [[token for token in prompt if token != -100] for part in p.inputs for prompt in part.tolist()]
    assert prompts == list(rows["x_tgt"])
    assert np.ravel(p.losses)[0] == pytest.approx(dsft_loss(trainer.model, batch_of(rows.select(range(4))), tiny.SUPERVISIONS["logits"])["loss"].item())


# ---- models
def test_model_init_is_the_model(tmp_path):
    given, made = (
        DSFTTrainer(args=arguments(tmp_path, max_steps=2), supervisions=tiny.SUPERVISIONS["logits"], train_dataset=tiny.data(), **model)
        for model in ({"model": tiny.model()}, {"model_init": tiny.model})
    )
    for trainer in (given, made, made):  # a second training begins anew
        trainer.train()
        assert tiny.largest_difference(trainer.model.state_dict(), given.model.state_dict()) == 0


def test_model_init_may_depend_on_the_trial(tmp_path):
    def deeper(trial):
        torch.manual_seed(0)
        sizes = tiny.SIZES | {"num_hidden_layers": (trial or {}).get("layers", 4), "max_position_embeddings": (trial or {}).get("positions", 64)}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))

    trainer = DSFTTrainer(None, arguments(tmp_path, max_steps=1), tiny.SUPERVISIONS["logits"], train_dataset=tiny.data(), model_init=deeper)
    assert trainer.terms[0].layer == 4 and trainer.limits.max_length == 64
    trainer.call_model_init({"layers": 6, "positions": 32})  # what `train` does in a search
    assert trainer.terms[0].layer == 6 and trainer.limits.max_length == trainer.data_collator.keywords["limits"].max_length == 32
    with pytest.raises(ValueError, match=r"layer 2 of the et logits supervision is not in 1\.\.1"):
        trainer.call_model_init({"layers": 1})


def test_a_search_over_hyperparameters(tmp_path):
    pytest.importorskip("optuna")
    args = arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer = DSFTTrainer(None, args, tiny.SUPERVISIONS["logits"], train_dataset=tiny.data(), eval_dataset=tiny.data(4), model_init=lambda: tiny.model())
    best = trainer.hyperparameter_search(lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)}, n_trials=2, backend="optuna")
    assert best.objective > 0 and set(best.hyperparameters) == {"learning_rate"}
    with pytest.raises(ValueError, match="does not support label_smoothing_factor = 0.5"):
        trainer.hyperparameter_search(lambda trial: {"label_smoothing_factor": trial.suggest_float("label_smoothing_factor", 0.5, 0.5)}, n_trials=1, backend="optuna")


def test_neither_model_nor_arguments_need_be_given_in_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert DSFTTrainer(tiny.model()).args.output_dir == "tmp_trainer"
    with pytest.raises(RuntimeError, match="requires either a `model` or `model_init`"):
        DSFTTrainer(args=arguments(tmp_path))


# ---- data
def test_batches_of_as_many_tokens(tmp_path):
    trainer = trained(tmp_path, train_sampling_strategy="batch_rebalance", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert np.isfinite(logged(trainer)).all() and trainer.state.global_step == 2


def test_lengths_need_a_table(tmp_path):
    args = arguments(tmp_path, max_steps=1, train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match="train_sampling_strategy = 'group_by_length' needs a datasets.Dataset") as error:
        DSFTTrainer(tiny.model(), args, train_dataset=list(tiny.data())).train()
    one_line(error)


class Stream(IterableDataset):
    def __iter__(self):
        yield from tiny.data()


@pytest.mark.parametrize("rows", [lambda: list(tiny.data()), Stream], ids=["list", "stream"])
def test_other_data_sets_give_the_same(tmp_path, rows):
    args = dict(max_steps=2, train_sampling_strategy="sequential", optim="sgd")
    table, other = (DSFTTrainer(tiny.model(), arguments(tmp_path, **args), tiny.SUPERVISIONS["mixed"], train_dataset=data) for data in (tiny.data(), rows()))
    for trainer in (table, other):
        trainer.train()
    assert tiny.largest_difference(table.model.state_dict(), other.model.state_dict()) == 0


def test_a_collator_of_ones_own(tmp_path):
    ours = lambda rows: collate([tuple(row[field] for field in TokenizedExample._fields) for row in rows], 7)
    own, default = (
        DSFTTrainer(tiny.model(), arguments(tmp_path, max_steps=2), tiny.SUPERVISIONS["logits"], data_collator=collator, train_dataset=tiny.data()) for collator in (ours, None)
    )
    for trainer in (own, default):
        trainer.train()
    assert tiny.largest_difference(own.model.state_dict(), default.model.state_dict()) == 0  # padding is masked, whatever it is
    strange = DSFTTrainer(tiny.model(), arguments(tmp_path, max_steps=1), data_collator=lambda rows: {"input_ids": torch.ones(2, 3)}, train_dataset=tiny.data())
    with pytest.raises(ValueError, match="data_collator: its batches have no x_tgt, which the losses read; dsft.data.collate makes them"):
        strange.train()


# ---- what is counted
def test_tokens_and_operations_are_counted(tmp_path):
    args = dict(max_steps=1, train_sampling_strategy="sequential")
    batch = batch_of(tiny.data(8))
    read = {"tft": ("x_tgt", "y_tgt"), "logits": TokenizedExample._fields, "feature": ("x_tgt", "y_tgt", "x_en")}
    for supervisions, fields in read.items():
        for kind, count in (("all", lambda field: batch[field].numel()), ("non_padding", lambda field: int(batch[f"{field}_mask"].sum()))):
            trainer = trained(tmp_path, supervisions=supervisions, include_num_input_tokens_seen=kind, **args)
            assert trainer.state.num_input_tokens_seen == sum(map(count, fields))
            assert trainer.state.log_history[0]["num_input_tokens_seen"] == sum(map(count, fields))
    # LC reads x_en up to layer 1 of 4, ET y_en up to layer 2
    columns = {field: batch[field].numel() for field in TokenizedExample._fields}
    parameters = tiny.model().num_parameters(exclude_embeddings=True)
    expected = 6 * parameters * (columns["x_tgt"] + columns["y_tgt"] + columns["x_en"] / 4 + columns["y_en"] / 2)
    assert trained(tmp_path, **args).state.total_flos == pytest.approx(expected)


# ---- trying again
def test_a_batch_that_is_too_large_leaves_no_trace(tmp_path, monkeypatch):
    """auto_find_batch_size: after the memory error the training is that of the smaller batch, and so are its logs."""
    tried, own = [], DSFTTrainer.compute_loss

    def compute_loss(self, model, inputs, **kwargs):
        loss = own(self, model, inputs, **kwargs)
        tried.append(len(inputs["x_tgt"]))
        if len(tried) == 2:
            raise RuntimeError("CUDA out of memory.")
        return loss

    monkeypatch.setattr(DSFTTrainer, "compute_loss", compute_loss)
    found = trained(tmp_path, auto_find_batch_size=True, logging_steps=2, train_sampling_strategy="sequential", save_strategy="no")
    monkeypatch.undo()
    assert tried[:2] == [8, 8] and 0 < tried[2] < 8
    log = found.state.log_history[0]
    assert log["loss"] == pytest.approx(log["loss_tft"] + log["loss_lc"] + log["loss_et"], rel=1e-6)
    # the try with 8 has moved the weights, as in transformers; the second one is told alone
    again = trained(tmp_path, per_device_train_batch_size=tried[2], logging_steps=2, train_sampling_strategy="sequential")
    assert log["loss_tft"] == pytest.approx(again.state.log_history[0]["loss_tft"], rel=0.05)


def test_a_second_training_tells_its_own_losses(tmp_path):
    trainer = tiny.trainer(tmp_path, max_steps=3, logging_strategy="no", learning_rate=1e-9)
    trainer.train()
    trainer.args.logging_strategy = transformers.trainer_utils.IntervalStrategy.STEPS
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["loss"] == pytest.approx(log["loss_tft"] + log["loss_lc"] + log["loss_et"], rel=1e-5)


def test_optimizers_are_taken(tmp_path):
    sgd = lambda model: torch.optim.SGD(model.parameters(), 0.1)
    flat = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    reference = tiny.trainer(tmp_path, max_steps=2)
    model = tiny.model()
    optimizer = sgd(model)
    given = DSFTTrainer(model, reference.args, tiny.SUPERVISIONS["logits"], train_dataset=tiny.data(), optimizers=(optimizer, flat(optimizer)))
    by_class = DSFTTrainer(tiny.model(), reference.args, tiny.SUPERVISIONS["logits"], train_dataset=tiny.data(), optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))
    for trainer in (reference, given, by_class):
        trainer.train()
        assert tiny.largest_difference(trainer.model.state_dict(), reference.model.state_dict()) == 0


# ---- rows that do not fit
def long_rows(n: int = 4) -> Dataset:
    return Dataset.from_list([{"id": f"e{k}", "x_tgt": [5] * 58, "y_tgt": [6] * 6, "x_en": [7] * (40 - k), "y_en": [8] * 20} for k in range(n)])


@pytest.mark.parametrize("family", ["learned", "rotary"])
@pytest.mark.parametrize("path", ["naive", "truncated", "auto"])
def test_branches_stay_within_the_positions(tmp_path, family, path, caplog):
    """Trained with what was cut by hand, the weights are the same."""
    torch.manual_seed(0)
    if family == "learned":
        config = transformers.GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=4, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    else:
        config = transformers.LlamaConfig(**tiny.SIZES, num_hidden_layers=4, max_position_embeddings=64)
    state = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    cut = long_rows().map(lambda row: row | {"x_en": row["x_en"][:6], "y_en": row["y_en"][:6]})
    weights = []
    for rows in (long_rows(), cut):
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.load_state_dict(state)
        dsft_trainer._warn_once.cache_clear()
        DSFTTrainer(model, arguments(tmp_path, max_steps=1), tiny.SUPERVISIONS["logits"], path, train_dataset=rows).train()
        weights.append({name: p.clone() for name, p in model.state_dict().items()})
        assert ("the training set: x_en is cut in 4 of 4 rows to the 64 tokens of a row" in caplog.text) == (rows is not cut)
        caplog.clear()
    assert tiny.largest_difference(*weights) == 0
    with pytest.raises(ValueError, match=r"x_tgt \+ x_en has 98 tokens, but \w+ has 64 positions"):
        dsft_loss(model, batch_of(long_rows()), tiny.SUPERVISIONS["logits"], path)


def test_what_is_read_by_itself_is_not_cut_for_the_query(tmp_path):
    assert row_limits(tiny.SUPERVISIONS["feature"], 64).cut(long_rows()[0])[2] == [7] * 40
    assert row_limits(tiny.SUPERVISIONS["logits"], 64).cut(long_rows()[0])[2] == [7] * 6
    assert row_limits(tiny.SUPERVISIONS["logits"], 64, None, 60).cut(long_rows()[0])[2] == [7] * 2  # the tightest holds
    assert row_limits((), None, None).max_length is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row: row | {"x_tgt": [5] * 64}, r"the training set row 0 \(from 0\) has an x_tgt that leaves no room in 64 tokens; shorten or drop it; so do 3 more"),
        (lambda row: row | {"y_en": []}, r"row 0 \(from 0\) has an empty y_en"),
        (lambda row: row | {"x_en": [7, 97] if row["id"] == "e2" else [7]}, r"row 2 \(from 0\) has a token id in x_en that is none of the 97 that the model embeds$"),
        (lambda row: row | {"y_tgt": [-100, 6]}, r"row 0 \(from 0\) has a token id in y_tgt"),
    ],
)
def test_rows_that_cannot_be_read_are_refused_before_the_first_step(tmp_path, change, words):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny.SIZES, num_hidden_layers=4, max_position_embeddings=64))
    trainer = DSFTTrainer(model, arguments(tmp_path, max_steps=1), tiny.SUPERVISIONS["logits"], train_dataset=long_rows().map(change))
    with pytest.raises(ValueError, match=words) as error:
        trainer.train()
    one_line(error)


def test_a_missing_column_is_named(tmp_path):
    with pytest.raises(ValueError, match="the training set has no column y_en; it has id, x_tgt, y_tgt, x_en"):
        DSFTTrainer(tiny.model(), arguments(tmp_path, max_steps=1), tiny.SUPERVISIONS["logits"], train_dataset=tiny.data().remove_columns("y_en")).train()


def test_a_pad_id_outside_of_the_embedding(tmp_path):
    """A [PAD] was added to the tokenizer and the embedding kept its size: padding is masked, so the same is trained, and what is saved can be loaded."""
    tokenizer, weights = transformers.AutoTokenizer.from_pretrained(ROOT / "models" / "micro-llama"), []
    for pad in ("<pad>", "[PAD]"):
        tokenizer.add_special_tokens({"pad_token": pad})
        trainer = DSFTTrainer(tiny.model(), arguments(tmp_path, max_steps=2), tiny.SUPERVISIONS["logits"], train_dataset=tiny.data(), processing_class=tokenizer)
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert tokenizer.pad_token_id == 6144 and tiny.largest_difference(*weights) == 0
    trainer.save_model(str(tmp_path / "model"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.config.pad_token_id < 97 == loaded.config.vocab_size and tokenizer.pad_token == "[PAD]"  # the caller's own is untouched
