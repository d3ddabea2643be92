"""The facts probe on models whose layers say what they are told to, and on files as they are and as they should not be."""

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import dsft.backbone
from dsft.checks import check_facts
from dsft.data import TokenizedExample
from dsft.files import ParamsError
from dsft.inside import base_curves, derangement, first_tokens, held_out_examples, language_curves, look_inside, measured_supervisions
from dsft.inside import parallel_clozes, query_gap_rows, query_gaps, read_clozes, tokenize_clozes
from dsft.methods import METHODS, Supervision, method_from_name
from dsft.microcosm import World
from dsft.results import Inside, LayerEntropy, RuleChoice, read_result, write_result
from dsft.selection import Curves, every_choice
from dsft.study import Run, Study, load_study
from dsft.tasks import write_tasks

WORDS = ["[UNK]", "France", "Italy", "is", "ruled", "from", "法国", "意大利", "的", "首都", "为", "Paris", "Rome", "巴黎", "罗马", "."]
ID = {word: n for n, word in enumerate(WORDS)}
FACTS = {
    "en": [("France is ruled from <mask>.", "Paris"), ("Italy is ruled from <mask>.", "Rome")],
    "zh": [("法国 的 首都 为 <mask> 。", "巴黎"), ("意大利 的 首都 为 <mask> 。", "罗马")],
}


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.WordLevel(ID, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def told(*layers: dict[str, float]) -> LlamaForCausalLM:
    """A model whose layer k adds to every state what the k-th of `layers` says: word -> by how much. States and logits have one dimension a word."""
    size = len(WORDS)
    sizes = dict(vocab_size=size, hidden_size=size, intermediate_size=1, num_attention_heads=1, num_hidden_layers=len(layers), mlp_bias=True)
    model = LlamaForCausalLM(LlamaConfig(**sizes, rms_norm_eps=0.0)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size)), model.lm_head.weight.copy_(torch.eye(size))
        for layer, words in zip(model.model.layers, layers):
            layer.self_attn.o_proj.weight.zero_(), layer.mlp.down_proj.weight.zero_(), layer.mlp.down_proj.bias.zero_()
            for word, much in words.items():
                layer.mlp.down_proj.bias[ID[word]] = much
    return model


def lens(last: str, **added: float) -> np.ndarray:
    """The distribution at a prompt that ends with the word `last`, by the plain formula."""
    state = np.eye(len(WORDS))[ID[last]]
    for word, much in added.items():
        state[ID[word]] += much
    logits = state / np.sqrt((state**2).mean())
    return np.exp(logits) / np.exp(logits).sum()


THINKS_IN_ENGLISH = ({}, {"Paris": 3.0, "Rome": 1.0}, {}, {"Paris": -3.0, "Rome": -1.0, "巴黎": 2.0})


def study_with(tmp_path, facts=FACTS, facts_at="", **evaluation) -> Study:
    for lang, rows in facts.items():
        lines = ["Prompt\tAns\tCandidate Ans\tSubject", *(f"{prompt}\t{answer}\tx, {answer}\tS" for prompt, answer in rows)]
        (tmp_path / f"facts.{lang}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    evaluation = {"facts": facts_at or f"{tmp_path}/facts.{{lang}}.tsv"} | evaluation
    return Study(name="told", models={"m": {"path": "nowhere/m"}}, languages=["zh", "vi"], methods=["base"], evaluation=evaluation, runs=str(tmp_path / "runs"))


def test_each_layer_says_what_it_was_told(tmp_path, tokenizer):
    facts = tokenize_clozes(tokenizer, parallel_clozes(study_with(tmp_path), "zh"), limit=9)
    assert [[tokenizer.decode(q.prompt) for q in fact.values()] for fact in facts] == [["法国 的 首都 为", "France is ruled from"], ["意大利 的 首都 为", "Italy is ruled from"]]
    found = language_curves(told(*THINKS_IN_ENGLISH), facts)
    nothing, english, target = lens("为"), lens("为", Paris=3.0, Rome=1.0), lens("为", 巴黎=2.0)
    mean = lambda p, *words: np.mean([p[ID[word]] for word in words])
    expected = [nothing, nothing, english, english, target]
    np.testing.assert_allclose(found["en"], [mean(p, "Paris", "Rome") for p in expected], rtol=1e-5)
    np.testing.assert_allclose(found["tgt"], [mean(p, "巴黎", "罗马") for p in expected], rtol=1e-5)
    asked_en = [lens("from"), lens("from"), lens("from", Paris=3.0, Rome=1.0), lens("from", Paris=3.0, Rome=1.0), lens("from", 巴黎=2.0)]
    np.testing.assert_allclose(found["en_asked_en"], [mean(p, "Paris", "Rome") for p in asked_en], rtol=1e-5)


def test_the_english_rule_finds_the_layer_that_speaks_english(tmp_path, tokenizer):
    examples = {"x_tgt": ["法国 的", "意大利 的"], "x_en": ["France is", "Italy is"], "y_tgt": ["巴黎", "罗马"], "y_en": ["Paris", "Rome"]}
    asked, measured = base_curves(told(*THINKS_IN_ENGLISH), tokenizer, study_with(tmp_path), "zh", examples)
    assert asked == "2 cloze facts" and [len(curve) for curve in measured.values()] == [5, 5, 5]
    choice = next(c for c in every_choice(Curves([0.0] * 5, **measured)) if c.rule == "english")
    assert (choice.i, choice.j, choice.holds) == (1, 2, True)  # of the layers 2 and 3, which say the same, the lower one
    without = study_with(tmp_path / "none", facts={}, source="hub")
    asked, measured = base_curves(told(*THINKS_IN_ENGLISH), tokenizer, without, "zh", examples)
    assert asked == "2 training examples"
    np.testing.assert_allclose(measured["english"][2], np.mean([lens("的", Paris=3.0, Rome=1.0)[ID[word]] for word in ("Paris", "Rome")]), rtol=1e-5)


def test_only_the_last_position_is_decoded(tmp_path, tokenizer, monkeypatch):
    facts = tokenize_clozes(tokenizer, parallel_clozes(study_with(tmp_path), "zh"), limit=9)
    rows, visit = [], dsft.backbone.Backbone.visit_logits
    monkeypatch.setattr(dsft.backbone.Backbone, "visit_logits", lambda self, states, see: rows.extend(map(len, states)) or visit(self, states, see))
    language_curves(told(*THINKS_IN_ENGLISH), facts)
    assert rows == [2] * 5 * 2  # two facts, five depths, asked in two languages: one row a fact


def test_which_facts_are_asked(tmp_path, tokenizer):
    facts = {
        "en": [*FACTS["en"], ("France is ruled from <mask>.", "Rome"), ("<mask> is ruled from Rome.", "Italy"), ("Italy is ruled from <mask>.", "Rome"), ("Rome is from <mask>.", "Italy")],
        "zh": [*FACTS["zh"], ("法国 的 首都 为 <mask> 。", "罗马"), ("罗马 为 <mask> 。", "意大利"), ("法国 为 <mask> .", "Rome"), ("罗马 为 <mask> 的 .", "意大利")],
    }
    asked = tokenize_clozes(tokenizer, parallel_clozes(study_with(tmp_path, facts), "zh"), limit=9)
    # not: a prompt again; a mask that nothing stands before; answers that begin alike; a sentence that goes on after its mask
    assert [tokenizer.decode(fact["tgt"].first) for fact in asked] == ["巴黎", "罗马"]
    assert len(tokenize_clozes(tokenizer, parallel_clozes(study_with(tmp_path, facts), "zh"), limit=1)) == 1


def test_an_answer_begins_with_or_without_a_space():
    vocabulary = ["▁", "a", "▁a", "b", "猫", "▁b", "ab", "▁ab"]
    backend = Tokenizer(models.BPE({token: n for n, token in enumerate(vocabulary)}, [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert first_tokens(tokenizer, "ab") == (6, 7)
    assert first_tokens(tokenizer, "猫") == (4,)  # ▁ by itself begins every answer and says nothing


# The header of one file in circulation has the name of its third column broken in two; lines may end in \r\n, a file may begin with a byte order mark.
@pytest.mark.parametrize("text", [
    "Prompt\tAns\tCandidate\tAns\tSubject\n法国的首都为<mask>。\t巴黎\t罗马, 巴黎\t法国\n",
    "\ufeffPrompt\tAns\tCandidate Ans\tSubject\r\n法国的首都为<mask>。\t巴黎 \t罗马, 巴黎\t法国\r\n",
    "Prompt\tAns\n\n法国的首都为<mask>。\t巴黎",
])  # fmt: skip
def test_files_that_are_read(tmp_path, text):
    (tmp_path / "zh.tsv").write_text(text, encoding="utf-8", newline="")
    assert read_clozes(tmp_path / "zh.tsv") == [{"prompt": "法国的首都为<mask>。", "answer": "巴黎"}]


@pytest.mark.parametrize(("text", "said"), [
    ("", "the first line must name the columns"),
    ("Ans\tPrompt\n巴黎\t<mask>", "the first line must name the columns"),
    ("Prompt\tAns\n法国的首都为[MASK]。\t巴黎\n", "line 2"),
    ("Prompt\tAns\n法国的首都为<mask>。\t巴黎\n<mask><mask>\t巴黎\n", "line 3"),
    ("Prompt\tAns\n法国的首都为<mask>。\n", "line 2"),
    ("Prompt\tAns\n法国的首都为<mask>。\t \n", "line 2"),
])  # fmt: skip
def test_files_that_are_refused_in_one_line(tmp_path, text, said):
    (tmp_path / "zh.tsv").write_text(text, encoding="utf-8")
    with pytest.raises(ParamsError, match=said) as error:
        read_clozes(tmp_path / "zh.tsv")
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{tmp_path}/zh.tsv: ")


def test_facts_are_parallel_by_row(tmp_path):
    study = study_with(tmp_path, FACTS | {"zh": FACTS["zh"][:1]})
    with pytest.raises(ParamsError, match=r"facts\.zh\.tsv: 1 facts, facts\.en\.tsv has 2; they must be parallel by row"):
        check_facts(study)


def test_a_language_without_facts_goes_without_and_none_at_all_is_a_mistake(tmp_path, capsys):
    check_facts(study_with(tmp_path))
    assert "has no facts in 'vi'" in capsys.readouterr().out
    with pytest.raises(ParamsError, match=r"evaluation\.facts = .*no such files in English and zh or vi"):
        check_facts(study_with(tmp_path, facts_at=f"{tmp_path}/fact.{{lang}}.tsv"))


def test_the_microcosm_has_its_own_facts(tmp_path):
    study = load_study("smoke").model_copy(update={"runs": str(tmp_path)})
    clozes = parallel_clozes(study, "zh")
    assert clozes == [{"tgt": item["zh"], "en": item["en"]} for item in World().clozes()] and len(clozes) == 3 * 64
    world = World()
    held_out = {(relation, line.subject): line for relation in world.knowledge for line in world.known[relation, "test"]}
    for item in World().clozes():
        line = world._understood(item["en"]["prompt"].replace("<mask>", item["en"]["answer"]))
        if line is not None:  # a few English sentences can be read in two ways
            assert line.relation == item["relation"] and held_out[line.relation, line.subject].value == line.value


def test_facts_without_questions(tmp_path, tokenizer):
    found, pooled = look_inside(told(*THINKS_IN_ENGLISH), tokenizer, study_with(tmp_path), "zh")
    assert (found["items"], found["distinct"], found["facts"], pooled) == (0, 0, 2, {})
    values = {(row["quantity"], row["layer"]): row["value"] for row in found["rows"]}
    assert values["facts_en", 2] > values["facts_tgt", 2] and values["facts_tgt", 4] > values["facts_en", 4]
    key = {"study": "told", "model": "m", "lang": "zh", "method": "base", "seed": 0}
    write_result(tmp_path / "inside.json", Inside(**key, **found))
    assert read_result(tmp_path / "inside.json", Inside).facts == 2
    found, _ = look_inside(told(*THINKS_IN_ENGLISH), tokenizer, study_with(tmp_path), "vi")
    assert (found["facts"], found["rows"]) == (0, [])


def test_layers_file_of_every_age(tmp_path):
    old = {"model": "m", "lang": "zh", "entropy": [9.0, 7, 7, 7, 4, 1], "i": 1, "j": 3, "rule": "entropy", "falls_twice": True, "r2": 0.97, "tokens": 900}
    old["example"] = {"tokens": ["a"], "entropy": [[h] for h in old["entropy"]]}
    assert LayerEntropy(**old).premise is True and LayerEntropy(**old | {"rule": "fixed"}).premise is None
    assert LayerEntropy(**old | {"entropy": [0.0, 7, 7, 7, 4, 1]}).premise is False  # it can be told from the curve
    new = LayerEntropy(**old | {"rule": "english"}, rules=[RuleChoice(rule="english", i=1, j=3, holds=False, rests_on="nothing")], english=[0.1] * 6)
    write_result(tmp_path / "layers.json", new)
    assert read_result(tmp_path / "layers.json", LayerEntropy).premise is False
    with pytest.raises(ValueError, match="english has 2 values, entropy has 6"):
        LayerEntropy(**old, english=[0.1] * 2)


def rows_of(count: int) -> list[TokenizedExample]:
    return [TokenizedExample(*(row[field] for field in TokenizedExample._fields)) for row in tiny.data(count)]


def loss_by_hand(model, example: TokenizedExample, s: Supervision) -> tuple[float, int]:
    """The loss of one example summed, and what it is a mean over, from transformers' own hidden states."""
    states = lambda ids: model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    if s.kind == "feature":
        h_en = states(example.x_en)[tiny.LAYERS if s.stage == "et" else s.layer][0].mean(0)
        return 1 - float(F.cosine_similarity(h_en, states(example.x_tgt)[s.layer][0].mean(0), dim=0)), 1
    said = example.x_en if s.stage == "lc" else example.y_en
    hidden = states(example.x_tgt + said)[s.layer][0, len(example.x_tgt) - 1 : -1]
    return float(F.cross_entropy(model.lm_head(model.model.norm(hidden)), torch.tensor(said), reduction="sum")), len(said)


@pytest.mark.parametrize("s", [Supervision(stage=stage, kind=kind, layer=layer) for stage, layer in (("lc", 1), ("et", 3)) for kind in ("logits", "feature")], ids=str)
@torch.no_grad()
def test_the_query_gap_is_the_loss_of_matched_minus_that_of_mismatched_pairs(s):
    model, examples = tiny.model().eval(), rows_of(11)
    means = []
    for other in (list(range(11)), derangement(11, seed=5)):
        found = [loss_by_hand(model, e._replace(x_tgt=examples[n].x_tgt), s) for e, n in zip(examples, other)]
        means.append(sum(loss for loss, _ in found) / sum(count for _, count in found))
    for batch_size in (3, 32):
        assert query_gaps(model, examples, [s], seed=5, batch_size=batch_size) == pytest.approx([means[0] - means[1]], abs=2e-5)
    weighted = Supervision(stage=s.stage, kind=s.kind, layer=s.layer, weight="balanced")
    assert query_gaps(model, examples, [weighted], seed=5) == pytest.approx([means[0] - means[1]], abs=2e-5)  # weights do not count


def test_a_model_that_learned_to_convert_has_a_gap_and_one_that_does_not_look_at_the_query_has_none():
    """Without attention a state knows its own token only, and all queries end with the same one."""
    model = tiny.model().eval()
    lc, et = METHODS["dsft_logits"].at(1, 2)
    examples = [e._replace(x_tgt=[*e.x_tgt, 96]) for e in rows_of(9)]
    looking = query_gaps(model, examples, [lc, et])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    assert query_gaps(model, examples, [lc, et]) == [0.0, 0.0] and all(looking)

    model, copies = tiny.model(), [e._replace(x_en=e.x_tgt) for e in rows_of(8)]  # English that says what the query says
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        ids = torch.tensor([(e.x_tgt + e.x_en)[:6] for e in copies])
        F.cross_entropy(model(ids).logits[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten()).backward()
        optimizer.step()
    assert query_gaps(model.eval(), copies, [Supervision(stage="lc", kind="logits", layer=tiny.LAYERS)])[0] < -0.1


def test_no_query_stays_with_its_example():
    for seed in range(20):
        assert all(n != other for n, other in enumerate(derangement(7, seed))) and sorted(derangement(7, seed)) == list(range(7))
    assert derangement(50, 1) == derangement(50, 1) != derangement(50, 2)


def test_what_is_measured_is_what_the_method_supervises(tmp_path):
    study = load_study("smoke").model_copy(update={"runs": str(tmp_path)})
    measured = lambda name: {(s.stage, s.kind): s for s in measured_supervisions(Run(study, "mini-llama", "zh", method_from_name(name), 0), 1, 3)}
    assert {key: s.layer for key, s in measured("tft").items()} == {("lc", "logits"): 1, ("lc", "feature"): 1, ("et", "logits"): 3, ("et", "feature"): 3}
    assert {key: s.layer for key, s in measured("dsft_feature_at2_4").items()} == {("lc", "logits"): 2, ("lc", "feature"): 2, ("et", "logits"): 4, ("et", "feature"): 4}
    assert measured("dsft_feature_last")["et", "feature"].pooling == "last" and measured("dsft_feature_last")["et", "logits"] == METHODS["et_logits"].at(1, 3)[0]


def test_the_examples_are_held_out_and_any_two_of_them_fit_together(tmp_path, tokenizer):
    study = load_study("smoke").model_copy(update={"runs": str(tmp_path)})
    assert held_out_examples(study, "zh", tokenizer, 200, 1024) == []  # nothing was asked yet
    assert query_gap_rows(told({}), tokenizer, study.run("mini-llama", "zh", "base", 0), 1, 2) == []
    write_tasks(study, "zh"), write_tasks(study, "en")
    examples = held_out_examples(study, "zh", tokenizer, 200, 1024)
    assert len(examples) == study.data.held_out == 24
    longest = sorted(max(map(len, example)) for example in examples)
    some = held_out_examples(study, "zh", tokenizer, 200, 2 * longest[11] + 1)
    assert some == [example for example in examples if max(map(len, example)) <= longest[11]]
