"""The explorer: its table is what the model's own states say by the plain formula, whatever the architecture; odd questions and models are told in a line."""

from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from test_figures import DEUTERANOPIA, seen

from dsft import explorer
from dsft.backbone import UnsupportedArchitecture
from dsft.explorer import COLORS, KINDS, Panel, Subject, as_html, changes, draw, explorable, load_subject, picture, read_layers, shade, stages, token_text, vocabulary_kinds
from dsft.files import ParamsError
from dsft.prompts import TEMPLATES
from dsft.study import load_study

QUESTION = "伊万有一张星期四的车票。海伦今天买了米饭。海伦今天带了什么回家？"
SIZES = dict(vocab_size=6144, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0, sliding_window=4, attn_implementation="eager"),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
}


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(ROOT / "models" / "micro-llama")


def subject_of(name: str, tokenizer, lang: str = "zh") -> Subject:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # else all tokens are as likely as each other
    return Subject(model, tokenizer, lang, TEMPLATES["plain"])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_is_what_the_models_own_states_say(name, tokenizer):
    subject = subject_of(name, tokenizer)
    table = read_layers(subject, QUESTION, max_new_tokens=4).table
    ids = tokenizer(f"{QUESTION}\n")["input_ids"]  # with the <s> in front of it
    rest = table.query(f"layer == 3 and position >= {len(ids) - 1}")["token"].tolist()
    ids += rest[: table["position"].max() + 1 - len(ids)]  # what the output says is what comes next
    with torch.no_grad():
        own = subject.model(torch.tensor([ids]), output_hidden_states=True)
        states = [subject.model.model.norm(h) for h in own.hidden_states[:-1]] + [own.hidden_states[-1]]
        logits = torch.stack([subject.model.lm_head(h)[0].double() for h in states])
    cap = getattr(subject.model.config, "final_logit_softcapping", None)
    p = (cap * torch.tanh(logits / cap) if cap else logits).softmax(-1).numpy()
    np.testing.assert_allclose(p[-1], own.logits[0].double().softmax(-1).numpy(), atol=1e-6)
    square = lambda column: table.pivot(index="layer", columns="position", values=column).to_numpy()
    chosen = np.take_along_axis(p, square("token")[..., None], -1)[..., 0]
    np.testing.assert_allclose(chosen, p.max(-1), rtol=1e-4)  # of two that are as likely either may be told
    np.testing.assert_allclose(square("probability"), chosen, rtol=1e-4)
    np.testing.assert_allclose(square("entropy"), -(p * np.log(p)).sum(-1), rtol=1e-4)
    kinds = vocabulary_kinds(tokenizer, "zh", 6144)
    for n, kind in enumerate(KINDS[1:], 1):
        np.testing.assert_allclose(square(kind), p[..., kinds == n].sum(-1), atol=1e-4)
    assert (table["kind"] == [KINDS[kinds[token]] for token in table["token"]]).all()
    assert table[table["layer"] == 0]["read"].tolist()[1 : len(ids)] == [token_text(tokenizer, token, ids[:n]) for n, token in enumerate(ids)][1:]


@pytest.mark.parametrize("question", ["", " \n\t", "\u200b", None, 7])
def test_a_question_that_is_none_is_refused(question, tokenizer):
    with pytest.raises(ParamsError, match="^question: there is nothing in it; write a question$"):
        read_layers(subject_of("llama", tokenizer), question)


@pytest.mark.parametrize("question", ["?", "🦊", "</s><s>", "<b>&amp;</b>", "a\nb", "e\u0301té", "\ud83e".encode("utf-8", "replace").decode()])
def test_odd_questions_are_answered_and_shown(question, tokenizer):
    reading = read_layers(subject_of("llama", tokenizer), question, max_new_tokens=2)
    page = as_html(reading, "zh", "<title>")
    assert "<b><" not in page and "<title>" not in page and page.count("<tr>") == 1 + 4


def test_a_question_that_is_too_long_is_refused(tokenizer):
    with pytest.raises(ParamsError, match=r"^question: \d+ tokens, and 16 for the answer, are more than the 64 positions of LlamaForCausalLM; shorten it$"):
        read_layers(subject_of("llama", tokenizer), QUESTION * 5)


def test_a_token_that_the_model_does_not_embed_is_refused(tokenizer):
    subject = subject_of("llama", tokenizer)
    subject.model.resize_token_embeddings(100)
    with pytest.raises(ParamsError, match="is a token that LlamaForCausalLM does not embed; leave it out"):
        read_layers(subject, QUESTION)


def test_models_that_the_lens_would_misread_are_refused(tokenizer):
    subject = subject_of("llama", tokenizer)
    del subject.model.model.norm
    subject.model.model.add_module("norm", torch.nn.Identity())
    with pytest.raises(UnsupportedArchitecture, match="0 norms after its layers"):
        read_layers(subject, QUESTION)
    scaled = transformers.AutoModelForCausalLM.from_config(transformers.CohereConfig(**SIZES)).eval()  # scales its logits
    with pytest.raises(UnsupportedArchitecture, match="its logits are not its LM head on its final norm"):
        read_layers(subject._replace(model=scaled), QUESTION)


@pytest.mark.parametrize("by", [np.eye(3), DEUTERANOPIA], ids=["by most", "with deuteranopia"])
def test_the_languages_are_told_apart(by):
    distance = {(a, b): np.linalg.norm(seen(COLORS[a], by) - seen(COLORS[b], by)) for a, b in combinations(COLORS, 2)}
    assert min(distance.values()) > 15, min(distance, key=distance.get)
    assert min(np.linalg.norm(seen(shade(kind, p), by) - seen("#1a1a1a", by)) for kind in COLORS for p in (0.0, 1.0)) > 35  # letters can be read on all of them


def test_picture_and_page_of_a_shipped_base(recwarn):
    run = load_study("micro").run("micro-llama", "zh", "base", 0)
    reading = read_layers(load_subject(run), QUESTION)
    found = stages(reading.table)
    assert reading.answer == "米饭" and found.target == 8 and found.english[1] == 7
    figure = draw({"one": reading, "two": reading}, "zh", columns=4)
    figure.canvas.draw()
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert "rice" in shown and "MiFan" in shown and len(figure.axes) == 4
    plt.close(figure)
    assert not [w for w in recwarn if "missing from font" in str(w.message)]
    assert changes(reading.table, reading.table)["changed"].eq(0).all()


def test_the_panel_goes_by_what_is_on_the_disk(monkeypatch):
    runs = [run for run in explorable(["micro", "micro-full"]) if not run.method.stages]
    panel = Panel(runs)
    first = panel.page.value
    assert "rice" in first and "米饭" in first
    panel.model.value = ("micro-full", "micro-gemma2")
    assert panel.lang.value == "zh" and panel.page.value != first
    panel.lang.value = "vi"
    asked = panel.question.value
    assert asked and "Vietnamese" in panel.page.value
    panel.question.value = "x" * 5000
    assert "shorten it" in panel.page.value and panel.page.value.count("<p") == 1
    panel.question.value = asked
    panel.other.value = panel.method.value
    assert panel.page.value.count("<table") == 2
    monkeypatch.setattr(explorer, "_loaded", lambda folder: (_ for _ in ()).throw(ParamsError("spoilt")))
    panel.other.value = ""
    assert "<b>spoilt</b>" in panel.page.value
    with pytest.raises(ParamsError, match="^there is no model on this disk"):
        Panel([])


def test_the_command_says_in_one_line_what_is_wrong():
    for wrong, said in (({"study": "none"}, "none"), ({"model": "none"}, "parameter model = 'none'"), ({"lang": "de"}, "parameter lang = 'de'")):
        with pytest.raises(SystemExit, match="^dsft: .*" + said):
            picture(**wrong)
