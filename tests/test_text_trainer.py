"""Text in: the trainer's and a study's token ids of instructions and conversations, against transformers' own chat templates; wrong columns are told before anything is trained."""

import json
import unicodedata

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT
from datasets import Dataset
from lm_eval.api.instance import Instance

from dsft.cached_lm import SharedContextLM
from dsft.chat import end_of_turn
from dsft.data import load_parallel, tokenize
from dsft.files import ParamsError
from dsft.generation import greedy_answers
from dsft.methods import METHODS
from dsft.prompts import TEMPLATES, conversation
from dsft.settings import DataParams
from dsft.study import Study, load_study
from dsft.tasks import evaluate
from dsft.trainer import DSFTTrainer
from dsft.training import fine_tune, training_data

BASE = ROOT / "models" / "micro-llama"
DSFT = METHODS["dsft_logits"].at(2, 6)

# Markup in the manner of well-known families, with the special tokens that it needs; "marked" tells transformers where the assistant speaks.
CHAT = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
    ),
    "marked": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
    ),
    "turns": (
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ["<start_of_turn>", "<end_of_turn>"],
    ),
    "inst": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
        [],
    ),
}


def chat_tokenizer(name: str) -> transformers.PreTrainedTokenizerBase:
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    template, special = CHAT[name]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def model_for(tokenizer) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model


def arguments(folder, **changes) -> transformers.TrainingArguments:
    given = dict(max_steps=2, per_device_train_batch_size=4, learning_rate=1e-4, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False)
    return transformers.TrainingArguments(str(folder), **given | changes)


def say(*texts: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * len(texts), texts)]


TALKS = Dataset.from_list(
    [
        {"id": "a", "messages_tgt": say("说出一种颜色。", "红色。", "再说一种。", "蓝色。"), "messages_en": say("Name a colour.", "Red.", "Another one.", "Blue.")},
        {"id": "b", "messages_tgt": say("李明住在哪里？", "北京。"), "messages_en": say("Where does Li Ming live?", "In Beijing.")},
        {"id": "c", "messages_tgt": [{"role": "system", "content": "简短。"}, *say("一加一？", "二。")], "messages_en": [{"role": "system", "content": "Be brief."}, *say("One and one?", "Two.")]},
    ]
)
TEXT = Dataset.from_list(
    [
        {"instruction_tgt": f"{n} cộng {n} bằng mấy?", "input_tgt": "Tính nhẩm." if n % 2 else None, "output_tgt": f"Bằng {2 * n}.",
         "instruction_en": f"What is {n} and {n}?", "input_en": "Do it in your head." if n % 2 else "", "output_en": f"It is {2 * n}."}
        for n in range(12)
    ]
)  # fmt: skip


@pytest.mark.parametrize("template", ["alpaca", "plain", "chat"])
def test_the_ids_are_those_of_a_study(tmp_path, template):
    tokenizer = chat_tokenizer("chatml")
    files = {}
    for lang, side in (("vi", "tgt"), ("en", "en")):
        rows = [{"instruction": r[f"instruction_{side}"], "input": r[f"input_{side}"], "output": r[f"output_{side}"]} for r in TEXT]
        files[lang] = str(tmp_path / f"{lang}.json")
        (tmp_path / f"{lang}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    data = DataParams(source="files", files=files, template=template, check_language=False)
    study = tokenize(load_parallel(data, "vi"), tokenizer, 256)
    decomposed = TEXT.map(lambda row: {name: text and unicodedata.normalize("NFD", text) for name, text in row.items()})
    trainer = DSFTTrainer(model_for(tokenizer), arguments(tmp_path), DSFT, train_dataset=decomposed, eval_dataset={"one": TEXT}, processing_class=tokenizer, template=template, max_length=256)
    for dataset in (trainer.train_dataset, trainer.eval_dataset["one"]):
        assert dataset.remove_columns("id").to_list() == study.to_list()
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("name", CHAT)
def test_conversations_have_the_ids_of_their_chat_template(name, tmp_path):
    """x is what transformers asks with; x and y are a beginning of what it makes of the conversation up to that turn, and only white space follows."""
    tokenizer = chat_tokenizer(name)
    talks = TALKS.filter(lambda row: row["messages_tgt"][0]["role"] != "system") if name == "inst" else TALKS
    rows = DSFTTrainer(model_for(tokenizer), arguments(tmp_path), DSFT, train_dataset=talks, processing_class=tokenizer, template="chat").train_dataset
    expected = [(f"a/{n}" if talk["id"] == "a" else talk["id"], talk, end)
                for talk in talks for n, end in enumerate(i for i, m in enumerate(talk["messages_tgt"]) if m["role"] == "assistant")]  # fmt: skip
    assert rows["id"][:] == [row_id for row_id, *_ in expected]
    for row, (_, talk, end) in zip(rows, expected, strict=True):
        for side in ("tgt", "en"):
            messages = talk[f"messages_{side}"]
            ids = lambda upto, **how: tokenizer.apply_chat_template(messages[:upto], tokenize=True, return_dict=True, **how)["input_ids"]
            assert row[f"x_{side}"] == ids(end, add_generation_prompt=True)
            whole, found = ids(end + 1), row[f"x_{side}"] + row[f"y_{side}"]
            assert found == whole[: len(found)] and not tokenizer.decode(whole[len(found) :]).strip()
            assert row[f"y_{side}"][-1] == end_of_turn(tokenizer)


def test_the_loss_is_on_what_transformers_marks_as_the_assistants():
    tokenizer = chat_tokenizer("marked")
    for talk in TALKS:
        marked = tokenizer.apply_chat_template(talk["messages_tgt"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        said = [n for n, mark in zip(marked["input_ids"], marked["assistant_masks"]) if mark]
        rows = tokenize(Dataset.from_list(
            [{f"{x}_{side}": text for side in ("tgt", "en") for x, text in (("x", conversation(talk["messages_tgt"][:n])), ("y", m["content"]))}
             for n, m in enumerate(talk["messages_tgt"]) if m["role"] == "assistant"]), tokenizer, 256)  # fmt: skip
        assert sum(rows["y_tgt"][:], []) == said


@pytest.mark.parametrize("name", ["chatml", "turns"])
def test_tft_on_several_turns_is_the_loss_on_the_whole_conversation(tmp_path, name):
    """One row a turn: the mean over the tokens of all of the assistant's turns, each given what is before it, as one pass over the whole conversation has it."""
    tokenizer = chat_tokenizer(name)
    model = model_for(tokenizer).eval()
    trainer = DSFTTrainer(model, arguments(tmp_path), (), train_dataset=TALKS.select_columns(["messages_tgt"]), eval_dataset=TALKS, processing_class=tokenizer, template="chat")
    assert trainer.train_dataset.column_names == ["id", "x_tgt", "y_tgt"]
    losses = []
    for talk in TALKS:
        messages = talk["messages_tgt"]
        whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        nll = F.cross_entropy(model(torch.tensor([whole])).logits[0, :-1], torch.tensor(whole[1:]), reduction="none")
        for n in (n for n, m in enumerate(messages) if m["role"] == "assistant"):
            start = len(tokenizer.apply_chat_template(messages[:n], tokenize=True, return_dict=True, add_generation_prompt=True)["input_ids"])
            turn_end = whole.index(end_of_turn(tokenizer), start)
            losses += nll[start - 1 : turn_end].tolist()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert len(trainer.predict(TALKS).predictions) == 4  # text that is given later is read as well


def test_evaluation_asks_with_the_ids_of_training_and_stops_at_the_end_of_the_turn(tmp_path):
    tokenizer = chat_tokenizer("turns")
    model = model_for(tokenizer).eval()
    lm = SharedContextLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    prompt = TEMPLATES["chat"].prompt("Where does Anna live?")
    (row,) = tokenize(Dataset.from_list([{"x_tgt": prompt, "y_tgt": "Hanoi", "x_en": prompt, "y_en": "Hanoi"}]), tokenizer, 99)
    assert lm._encode_pair(prompt, "Hanoi") == (row["x_tgt"], row["y_tgt"][:-1])
    assert lm.tok_encode(prompt) == row["x_tgt"] == lm.tok_batch_encode([prompt])[0][0].tolist()

    end = end_of_turn(tokenizer)
    assert end != tokenizer.eos_token_id
    steps = []

    def say_end(module, inputs, logits):  # a model that always ends its turn
        steps.append(1)
        return F.one_hot(torch.tensor(end), logits.shape[-1]).float().expand_as(logits)

    model.lm_head.register_forward_hook(say_end)
    request = Instance(request_type="generate_until", doc={}, arguments=(prompt, {"until": [], "max_gen_toks": 8, "do_sample": False}), idx=0)
    assert lm.generate_until([request]) == [""] and len(steps) == 1
    assert greedy_answers(model, tokenizer, [prompt], "", 8) == [""] and len(steps) == 2


@pytest.fixture(scope="module")
def chat_study(tmp_path_factory) -> Study:
    base = tmp_path_factory.mktemp("base")
    tokenizer = chat_tokenizer("turns")
    tokenizer.save_pretrained(base)
    model_for(tokenizer).save_pretrained(base)
    return Study(
        name="chat", models={"m": {"path": str(base)}}, languages=["zh"], methods=["base", "tft"], layers={"i": 1, "j": 2},
        data={"items": 24, "max_length": 200, "template": "chat", "held_out": 8}, train={"max_steps": 1, "batch_size": 8, "per_device_batch_size": 8, "bf16": False},
        evaluation={"benchmarks": ["xquad", "xcopa", "instructions"], "items": 6}, runs=str(tmp_path_factory.mktemp("runs")),
    )  # fmt: skip


def test_a_study_in_the_markup_of_a_chat(chat_study):
    run = chat_study.run("m", "zh", "tft", 0)
    trainer = fine_tune(run)
    tokenizer = trainer.processing_class
    rows, examples = training_data(run, run.stages[0], tokenizer)
    assert trainer.state.global_step == 1
    assert tokenizer.decode(examples[0]["x_tgt"]).startswith("<s><start_of_turn>user\n") and tokenizer.decode(examples[0]["y_tgt"]).endswith("<end_of_turn>")
    assert json.loads((run.training_folder / "data_report.json").read_text())["tokens"]["answers cut"] == {"tgt": 0, "en": 0}
    scores, samples = evaluate(trainer.model.eval(), tokenizer, chat_study, ("zh", "en"))
    assert {s["dataset"] for s in scores} == {"xquad", "xcopa", "instructions"} and len(samples) == 2 * (6 + 6 + 8)
    assert not any("<" in s["prediction"] for s in samples if s["dataset"] == "xquad")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(evaluation={"num_fewshot": 2}), "asks without examples; leave evaluation.num_fewshot = 2 out"),
        (dict(evaluation={"backend": "vllm"}), "is asked by evaluation.backend: hf only, not by 'vllm'"),
        (dict(models={"m": {"path": "x", "vocabulary": {}}}), "models.m.vocabulary: is cut to texts"),
    ],
)
def test_what_does_not_go_with_a_chat_is_refused(chat_study, changes, message):
    given = {"name": "chat", "models": {"m": {"path": "x"}}, "languages": ["zh"], "methods": ["tft"], "data": {"template": "chat"}} | changes
    with pytest.raises(ValueError, match=message):
        Study(**given)


def without(*columns: str) -> Dataset:
    return TEXT.remove_columns([*columns])


def broken(**row) -> Dataset:
    return Dataset.from_list([TALKS[1], {**TALKS[1], **row}])


@pytest.mark.parametrize(
    ("dataset", "template", "supervisions", "message"),
    [
        (TEXT, None, DSFT, "has columns of text: say by template = 'alpaca', 'plain' or 'chat'"),
        (TEXT, "chatml", DSFT, "template = 'chatml' is none of alpaca, plain, chat"),
        (without("instruction_en", "input_en", "output_en"), "alpaca", DSFT, "has no column instruction_en, which the supervision of inner layers reads; it has "),
        (without("output_tgt"), "alpaca", (), "has no column output_tgt; it has "),
        (TALKS, "alpaca", DSFT, "has conversations (messages_tgt), which template = 'alpaca' cannot write"),
        (TALKS.remove_columns("messages_en"), "chat", DSFT, "has no column messages_en"),
        (broken(messages_en=say("Where?", "There.", "Why?", "So.")), "chat", DSFT, "row 1 (from 0): messages_tgt and messages_en: not parallel"),
        (broken(messages_tgt=say("在哪里？")), "chat", DSFT, "messages_tgt: does not end with a message of the assistant"),
        (broken(messages_tgt=say("在哪里？", " ")), "chat", DSFT, "messages_tgt: content of message 1 is empty"),
        (broken(messages_tgt=say("在<|im_end|>哪里？", "北京。")), "chat", DSFT, "spells out '<|im_end|>'"),
        (TEXT.map(lambda row, n: {"output_en": None if n == 3 else row["output_en"]}, with_indices=True), "plain", DSFT, "row 3 (from 0): output_en: output is missing; mend or drop it"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line_before_training(tmp_path, dataset, template, supervisions, message):
    tokenizer = chat_tokenizer("chatml")
    with pytest.raises(ParamsError) as error:
        DSFTTrainer(model_for(tokenizer), arguments(tmp_path), supervisions, train_dataset=dataset, processing_class=tokenizer, template=template)
    assert message in str(error.value) and "\n" not in str(error.value) and str(error.value).startswith("the training set: ")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template; take template alpaca or plain"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Reply: ' }}{% endif %}", "take one whose generation prompt begins its answers"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content | upper + '\n' }}{% endfor %}", "take one that leaves answers as they are"),
        ("{{ raise_exception('no system message') }}", "refuses the roles user: no system message"),
    ],
)
def test_a_template_that_cannot_be_used_is_told_in_one_line(tmp_path, template, message):
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = template
    text = Dataset.from_list([{"instruction_tgt": "Where?", "output_tgt": "there"}])
    with pytest.raises(ParamsError) as error:
        DSFTTrainer(model_for(tokenizer), arguments(tmp_path), (), train_dataset=text, processing_class=tokenizer, template="chat")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_study_without_a_chat_template_is_refused_before_it_runs():
    from dsft.checks import check_chat

    study = load_study("micro")
    with pytest.raises(ParamsError, match="has no chat template"):
        check_chat(study.model_copy(update={"data": study.data.model_copy(update={"template": "chat"})}))


def test_text_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ParamsError, match="processing_class is no tokenizer"):
        DSFTTrainer(model_for(chat_tokenizer("inst")), arguments(tmp_path), (), train_dataset=TEXT, template="plain")
