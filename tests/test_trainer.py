"""DSFTTrainer: what it optimises, what it logs, that it resumes, and that it refuses to train on less than asked for."""

import json
from dataclasses import replace
from math import isfinite

import pytest
import tiny
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file, save_file

from dsft.data import TokenizedExample, collate, parallel_rows
from dsft.files import ParamsError, write_json
from dsft.generation import greedy_answers, load_generator
from dsft.losses import dsft_loss, gradient_norms, join
from dsft.methods import METHODS, Method, Weight
from dsft.study import Study, load_study
from dsft.trainer import DSFTTrainer
from dsft.training import Checkpoints, clipped_share, fine_tune, last_complete_checkpoint, training_arguments

NAMES = ("loss", "tft", "lc", "et")


def losses(log: dict, prefix: str = "") -> list[float]:
    return [log[prefix + (name if name == "loss" else f"loss_{name}")] for name in NAMES]


def training_logs(trainer) -> list[dict]:
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("supervisions", tiny.SUPERVISIONS)
@pytest.mark.parametrize(("batch", "steps"), ((4, 2), (2, 4)))
def test_gradient_accumulation_changes_nothing(tmp_path, supervisions, batch, steps):
    whole = tiny.trainer(tmp_path, supervisions)
    whole.train()
    parts = tiny.trainer(tmp_path, supervisions, per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
    parts.train()
    assert tiny.largest_difference(parts.model.state_dict(), whole.model.state_dict()) < 1e-6
    for a, b in zip(training_logs(parts), training_logs(whole), strict=True):
        assert losses(a) == pytest.approx(losses(b), abs=1e-5)


def test_the_first_step_is_the_gradient_of_the_loss(tmp_path):
    trainer = tiny.trainer(tmp_path, "mixed", max_steps=1, train_sampling_strategy="sequential")
    reference = tiny.model()
    batch = collate([TokenizedExample(*(row[f] for f in TokenizedExample._fields)) for row in tiny.data(8)], 0)
    out = dsft_loss(reference, batch, tiny.SUPERVISIONS["mixed"], "naive")
    out["loss"].backward()
    torch.optim.SGD(reference.parameters(), 0.1).step()
    trainer.train()
    assert tiny.largest_difference(trainer.model.state_dict(), reference.state_dict()) < 1e-6
    assert losses(training_logs(trainer)[0]) == pytest.approx([out[name].item() for name in NAMES], rel=1e-5)


@pytest.mark.parametrize("accumulation", (1, 2))
def test_logs_are_means_since_the_last_log(tmp_path, accumulation):
    arguments = dict(per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation, max_steps=6)
    each = tiny.trainer(tmp_path, **arguments)
    each.train()
    thirds = tiny.trainer(tmp_path, logging_steps=3, **arguments)
    thirds.train()
    one = torch.tensor([losses(log) for log in training_logs(each)])
    three = torch.tensor([losses(log) for log in training_logs(thirds)])
    torch.testing.assert_close(one.view(2, 3, 4).mean(1), three, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one[:, 0], one[:, 1:].sum(1), rtol=1e-5, atol=1e-6)  # all weights are 1


@pytest.mark.parametrize("batch", (3, 40))
def test_evaluation_is_the_loss_of_the_whole_set(tmp_path, batch):
    trainer = tiny.trainer(tmp_path, eval_dataset=tiny.data(), per_device_eval_batch_size=batch)
    whole = collate([TokenizedExample(*(row[f] for f in TokenizedExample._fields)) for row in tiny.data()], 0)
    expected = dsft_loss(trainer.model, whole, tiny.SUPERVISIONS["logits"], "naive")
    metrics = trainer.evaluate()
    assert losses(metrics, "eval_") == pytest.approx([expected[name].item() for name in NAMES], rel=1e-5)
    assert losses(trainer.evaluate(metric_key_prefix="vi"), "vi_") == losses(metrics, "eval_")


def test_evaluation_in_training_leaves_its_logs_alone(tmp_path):
    without = tiny.trainer(tmp_path, logging_steps=5)
    without.train()
    between = tiny.trainer(tmp_path, logging_steps=5, eval_dataset=tiny.data(), eval_strategy="steps", eval_steps=2)
    between.train()
    assert losses(training_logs(between)[0]) == losses(training_logs(without)[0])
    assert [log["step"] for log in between.state.log_history if "eval_loss_et" in log] == [2, 4, 5]


class Stop(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4


@pytest.mark.parametrize("strategy", ("random", "group_by_length"))
def test_resume_is_bit_exact(tmp_path, strategy):
    arguments = dict(
        optim="adamw_torch",
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        max_steps=8,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=3,
        train_sampling_strategy=strategy,
    )
    whole = tiny.trainer(tmp_path / "whole", **arguments)
    whole.train()
    tiny.trainer(tmp_path / "cut", **arguments, callbacks=[Checkpoints(), Stop()]).train()
    checkpoint = last_complete_checkpoint(tmp_path / "cut")
    assert checkpoint.endswith("checkpoint-3")
    again = tiny.trainer(tmp_path / "cut", **arguments)
    again.train(resume_from_checkpoint=checkpoint)
    assert tiny.largest_difference(again.model.state_dict(), whole.model.state_dict()) == 0
    assert [losses(log) for log in training_logs(again)[3:]] == [losses(log) for log in training_logs(whole)[3:]]


def measured_logs(trainer) -> list[dict]:
    return [log for log in trainer.state.log_history if "grad_norm_tft" in log]


def weighed(**weight) -> tuple:
    return tuple(replace(s, weight=Weight(**weight)) for s in METHODS["dsft_logits"].at(1, 2))


@pytest.mark.parametrize("dropout", (0.0, 0.3))
@pytest.mark.parametrize("weight", ({"value": "balanced", "share": 0.5, "every": 2}, {"value": "balanced", "every": 4, "schedule": "linear"}, {"schedule": "linear"}))
def test_weights_that_change_are_resumed_bit_exactly(tmp_path, weight, dropout):
    def make(folder, **more):
        lm = tiny.model()
        for layer in lm.model.layers:
            layer.self_attn.attention_dropout = dropout
        arguments = dict(optim="adamw_torch", learning_rate=1e-2, max_steps=8, gradient_accumulation_steps=2, save_strategy="steps", save_steps=3)
        return tiny.trainer(tmp_path / folder, weighed(**weight), lm=lm, per_device_train_batch_size=4, gradient_norm_steps=5, **arguments, **more)

    whole = make("whole")
    whole.train()
    make("cut", callbacks=[Checkpoints(), Stop()]).train()
    checkpoint = last_complete_checkpoint(tmp_path / "cut")
    assert checkpoint.endswith("checkpoint-3")  # between two estimates
    again = make("cut")
    again.train(resume_from_checkpoint=checkpoint)
    assert tiny.largest_difference(again.model.state_dict(), whole.model.state_dict()) == 0
    told = lambda trainer: [{key: log[key] for key in sorted(log)} for log in measured_logs(trainer)]
    assert told(again) == told(whole) and [t.weight for t in again.terms] == [t.weight for t in whole.terms]


def test_a_balanced_weight_gives_a_loss_its_share_and_stays_until_the_next_estimate(tmp_path):
    lc, et = METHODS["dsft_logits"].at(1, 2)
    supervisions = (replace(lc, weight=Weight(value="balanced", share=0.25, every=3)), replace(et, weight=2.0))
    trainer, used, model = tiny.trainer(tmp_path, supervisions, max_grad_norm=1.0, train_sampling_strategy="sequential"), [], tiny.model()
    trainer.add_callback(type("Weights", (transformers.TrainerCallback,), {"on_step_end": lambda self, *args, **kwargs: used.append(trainer.terms[1].weight)})())
    trainer.train()
    first, second = measured_logs(trainer)
    assert (first["step"], second["step"]) == (0, 3) and used == [first["weight_lc"]] * 3 + [second["weight_lc"]] * 2
    rows = collate([TokenizedExample(*(row[f] for f in TokenizedExample._fields)) for row in tiny.data(8)], 0)
    norms = gradient_norms(model, rows, (lc, et), "naive")
    assert [first[f"grad_norm_{name}"] for name in ("tft", "lc", "et")] == pytest.approx(norms, rel=1e-4)
    assert first["weight_lc"] * norms[1] == pytest.approx(0.25 * norms[0], rel=1e-4) and first["weight_et"] == 2.0
    total = training_logs(trainer)[0]
    assert total["loss"] == pytest.approx(total["loss_tft"] + first["weight_lc"] * total["loss_lc"] + 2.0 * total["loss_et"], rel=1e-4)


@pytest.mark.parametrize("name", ("logits", "mixed"))
def test_measuring_gradients_changes_no_weight(tmp_path, name):
    trainers = []
    for every in (0, 2):
        trainers.append(tiny.trainer(tmp_path, name, gradient_norm_steps=every))
        for layer in trainers[-1].model.model.layers:
            layer.self_attn.attention_dropout = 0.3  # draws random numbers
        trainers[-1].train()
    plain, measured = trainers
    assert tiny.largest_difference(plain.model.state_dict(), measured.model.state_dict()) == 0
    assert not measured_logs(plain) and [log["step"] for log in measured_logs(measured)] == [0, 2, 4]
    assert [log["loss"] for log in training_logs(plain)] == [log["loss"] for log in training_logs(measured)]


@pytest.mark.parametrize(("limit", "expected"), ((0.0, 0.0), (1e-6, 1.0), (1e6, 0.0)))
def test_the_share_of_clipped_steps_is_logged(tmp_path, limit, expected):
    trainer = tiny.trainer(tmp_path, max_grad_norm=limit, logging_steps=2)
    trainer.train()
    assert [log["clipped"] for log in training_logs(trainer)] == [expected] * 3


def test_clipped_steps_are_counted_one_by_one(tmp_path):
    each = tiny.trainer(tmp_path, "tft", max_grad_norm=1e6)
    each.train()
    limit = sorted(log["grad_norm"] for log in training_logs(each))[2]
    one = tiny.trainer(tmp_path, "tft", max_grad_norm=limit)
    one.train()
    assert [log["clipped"] for log in training_logs(one)] == [float(log["grad_norm"] > limit) for log in training_logs(one)]
    assert clipped_share([training_logs(one), training_logs(one)]) == pytest.approx(sum(log["clipped"] for log in training_logs(one)) / 5)


def test_checkpoints_are_sealed_one_is_kept_and_the_seconds_noted(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    trainer = tiny.trainer(tmp_path, save_strategy="steps", save_steps=2, callbacks=[Checkpoints()])
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    seconds = [entry["train_seconds"] for entry in trainer.state.log_history if "train_seconds" in entry]
    assert len(seconds) == 4 and seconds == sorted(seconds)  # after steps 2, 4 and 5, and at the end


def test_saved_model_loads_as_a_plain_causal_lm(tmp_path):
    trainer = tiny.trainer(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert tiny.largest_difference(loaded.state_dict(), trainer.model.state_dict()) == 0
    ids = torch.arange(10)[None]
    trainer.model.eval()
    assert torch.equal(loaded(ids).logits, trainer.model(ids).logits)  # and nothing of ours stays in the trained model's forward


def test_grouping_by_length_saves_padding(tmp_path):
    def columns(trainer):
        return sum(join(batch, "x_tgt", "y_tgt").input_ids.shape[1] for batch in trainer.get_train_dataloader())

    plain, grouped = (
        tiny.trainer(tmp_path, "tft", train_sampling_strategy=s, per_device_train_batch_size=2)
        for s in ("random", "group_by_length")
    )
    assert columns(grouped) < columns(plain)


def test_lora_trains_the_adapters_and_is_merged_on_export(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny.model()
    adapted = peft.get_peft_model(tiny.model(), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    batch = collate([TokenizedExample(*(row[f] for f in TokenizedExample._fields)) for row in tiny.data(8)], 0)
    for path in ("naive", "truncated", "one_pass"):  # B = 0 at first: the adapted model is the base model
        supervisions = tiny.SUPERVISIONS["mixed"]
        torch.testing.assert_close(
            dsft_loss(adapted, batch, supervisions, path)["loss"], dsft_loss(base, batch, supervisions, path)["loss"]
        )
    trainer = tiny.trainer(tmp_path, "mixed", lm=adapted)
    frozen = {name: p.clone() for name, p in adapted.named_parameters() if not p.requires_grad}
    trainer.train()
    assert frozen and all(torch.equal(p, frozen[name]) for name, p in adapted.named_parameters() if name in frozen)
    ids = torch.arange(10)[None]
    expected = adapted.eval()(ids).logits
    assert not torch.allclose(expected, base(ids).logits)
    trainer.export(tmp_path / "model")
    torch.testing.assert_close(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")(ids).logits, expected)


def test_bf16_autocast_trains(tmp_path):
    trainer = tiny.trainer(tmp_path, "mixed", bf16=True)
    trainer.train()
    reference = tiny.trainer(tmp_path, "mixed")
    reference.train()
    assert losses(training_logs(trainer)[-1]) == pytest.approx(losses(training_logs(reference)[-1]), rel=0.02)
    assert 0 < tiny.largest_difference(trainer.model.state_dict(), reference.model.state_dict()) < 0.02


def test_the_bar_is_plain_text_on_stderr(tmp_path, capsys):
    tiny.trainer(tmp_path, disable_tqdm=False).train()
    captured = capsys.readouterr()
    assert "100%" in captured.err and "5/5" in captured.err and "tft=" in captured.err
    assert "loss" not in captured.out


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("MASTER_ADDR", "127.0.0.1", "only one process runs"), ("ACCELERATE_USE_FSDP", "true", "FSDP was asked for")],
)
def test_a_fallback_to_one_process_is_an_error(tmp_path, monkeypatch, name, value, message):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=message):
        tiny.trainer(tmp_path)


def test_wrong_use_is_refused_at_once(tmp_path):
    mt5 = transformers.MT5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    with pytest.raises(ValueError, match="MT5ForConditionalGeneration cannot be served"):
        tiny.trainer(tmp_path, lm=transformers.MT5ForConditionalGeneration(mt5))
    with pytest.raises(ValueError, match=r"layer 9 of the lc logits supervision is not in 1\.\.4"):
        DSFTTrainer(tiny.model(), transformers.TrainingArguments(str(tmp_path), use_cpu=True), METHODS["dsft_logits"].at(9, 2))


def test_a_method_may_train_for_longer_than_the_study():
    study = load_study("smoke")
    study = study.model_copy(update={"methods": (METHODS["tft"], Method(name="tft_compute", stages=[{"epochs": 1.4}])), "train": study.train.model_copy(update={"epochs": 3.0})})
    epochs = [training_arguments(run, run.stages[0]).num_train_epochs for run in (study.run("mini-llama", "zh", name, 0) for name in ("tft", "tft_compute"))]
    assert epochs == pytest.approx([3.0, 4.2])


@pytest.mark.parametrize(("steps", "every", "told"), [(1, 10, [1]), (5, 10, [5]), (5, 2, [2, 4, 5]), (4, 2, [2, 4])])
def test_the_last_steps_are_told_too(tmp_path, steps, every, told):
    trainer, each = (tiny.trainer(tmp_path, max_steps=steps, logging_steps=n) for n in (every, 1))
    for one in (trainer, each):
        one.train()
    assert [log["step"] for log in training_logs(trainer)] == told
    since = [log for log in training_logs(each) if log["step"] > ([0, *told][-2])]
    mean = torch.tensor([losses(log) for log in since]).mean(0).tolist()
    assert losses(training_logs(trainer)[-1]) == pytest.approx(mean, rel=1e-5)


def test_a_run_that_something_stops_tells_its_last_steps(tmp_path):
    stopped = tiny.trainer(tmp_path, max_steps=8, logging_steps=3, callbacks=[Stop()])
    stopped.train()
    assert [log["step"] for log in training_logs(stopped)] == [3, 4]
    silent = tiny.trainer(tmp_path, max_steps=2, logging_strategy="no")
    silent.train()
    assert training_logs(silent) == []


def test_a_training_that_was_done_is_still_told(tmp_path):
    """Killed between the last step and the saving: it goes on from the last checkpoint with no step left."""
    arguments = dict(max_steps=3, logging_steps=10, save_strategy="steps", save_steps=3)
    once, again = (tiny.trainer(tmp_path, **arguments) for _ in range(2))
    once.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert tiny.largest_difference(once.model.state_dict(), again.model.state_dict()) == 0
    assert again.state.global_step == 3 and [log["step"] for log in training_logs(again)] == [3]
    assert any("train_runtime" in log for log in again.state.log_history)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("change", ["whole", "lacks", "too many"])
def test_a_checkpoint_without_one_of_its_weights_is_an_error(tmp_path, tied, change):
    arguments = dict(max_steps=2, save_strategy="steps", save_steps=1, optim="adamw_torch")
    tiny.trainer(tmp_path, lm=tiny.model(tied), **arguments).train()
    file = tmp_path / "checkpoint-1" / "model.safetensors"
    weights = load_file(file)
    if change == "lacks":
        del weights["model.layers.2.mlp.up_proj.weight"]
    if change == "too many":
        weights["model.layers.4.mlp.up_proj.weight"] = torch.zeros(2)
    save_file(weights, file, metadata={"format": "pt"})
    again = tiny.trainer(tmp_path, lm=tiny.model(tied), **arguments)
    if change == "whole":
        again.train(resume_from_checkpoint=str(file.parent))
        assert again.state.global_step == 2
        return
    words = {"lacks": "has no weight model.layers.2.mlp.up_proj.weight", "too many": "has an unexpected weight model.layers.4.mlp.up_proj.weight"}
    with pytest.raises(ParamsError, match=f"the checkpoint in .* {words[change]}; remove it") as error:
        again.train(resume_from_checkpoint=str(file.parent))
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def few_positions(tmp_path_factory) -> Study:
    """A study on a GPT-2 of 40 positions, which the branches of some examples pass and their prompts and answers do not."""
    base = tmp_path_factory.mktemp("base")
    transformers.AutoTokenizer.from_pretrained(ROOT / "models" / "micro-llama").save_pretrained(base)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=6144, n_positions=40, n_embd=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=1)
    transformers.GPT2LMHeadModel(config).save_pretrained(base)
    return Study(
        name="few",
        models={"gpt2": {"path": str(base)}},
        languages=["zh"],
        methods=["tft", "lc_logits", "dsft_feature"],
        layers={"i": 1, "j": 2},
        data={"items": 32, "max_length": 256, "max_dropped": 0.9},
        train={"max_steps": 2, "batch_size": 8, "per_device_batch_size": 8, "bf16": False},
        runs=str(tmp_path_factory.mktemp("runs")),
    )


@pytest.mark.parametrize("method", ["tft", "lc_logits", "dsft_feature"])
def test_a_study_on_a_model_of_few_positions(few_positions, method):
    run = few_positions.run("gpt2", "zh", method, 0)
    write_json(run.layers_file, {"i": 1, "j": 2})
    trainer = fine_tune(run)
    assert trainer.state.global_step == 2 and all(map(isfinite, losses(training_logs(trainer)[0])))
    told = json.loads((run.training_folder / "data_report.json").read_text())["tokens"]
    longer = sum(len(row["x_tgt"]) + len(row["x_en"]) > 40 for row in trainer.train_dataset)
    assert told["max_length"] == 40 and told["branches cut"] == ({"x_en": longer} if method == "lc_logits" else {}) and longer > 0
    assert max(len(row["x_tgt"]) + len(row["y_tgt"]) for row in trainer.train_dataset) <= 40
    assert set(trainer.train_dataset["id"]) <= {row["id"] for row in parallel_rows(few_positions.data, "zh")[0]}


def test_prompts_longer_than_the_model_are_told(few_positions, monkeypatch):
    monkeypatch.setattr("dsft.training.max_positions", lambda config: 12)
    study = few_positions.model_copy(update={"data": few_positions.data.model_copy(update={"max_dropped": 0.01})})
    with pytest.raises(ParamsError, match=r"models\.gpt2: 12 positions: \d+ of 32 prompts leave no room for an answer, more than data.max_dropped = 0.01; take a longer model"):
        fine_tune(study.run("gpt2", "zh", "tft", 0))


def test_prompts_of_a_generation_stay_within_the_positions(few_positions):
    run = few_positions.run("gpt2", "zh", "tft", 0)
    model, tokenizer = load_generator(run, run.base)
    assert greedy_answers(model, tokenizer, ["word " * 100, "a"], "\n", 8)[1] == greedy_answers(model, tokenizer, ["a"], "\n", 8)[0]
