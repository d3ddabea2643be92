"""The DSFT losses against an oracle for one example in plain torch, on tiny random models of every architecture served."""

import itertools
from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from torch.func import functional_call

import dsft.backbone
import dsft.losses
from dsft.backbone import UnsupportedArchitecture, find_backbone, one_pass_obstacle
from dsft.data import TokenizedExample, collate
from dsft.losses import Supervision, choose_path, dsft_loss, gradient_norms, summed_nll, terms_of

PATHS = ("naive", "truncated", "one_pass")
LAYERS = 6
TINY = dict(tiny.SIZES, num_hidden_layers=LAYERS, pad_token_id=0, bos_token_id=1, eos_token_id=2, attention_dropout=0.0)
GEMMA = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=5, tie_word_embeddings=True)
ARCHITECTURES = {
    "llama": ("Llama", {}, "sdpa"),
    "llama-eager": ("Llama", {}, "eager"),
    "llama-tied": ("Llama", dict(tie_word_embeddings=True), "sdpa"),
    "mistral": ("Mistral", dict(sliding_window=5), "sdpa"),
    "qwen2": ("Qwen2", {}, "sdpa"),
    "qwen2-sliding": ("Qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=3), "sdpa"),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True), "sdpa"),
    "gemma": ("Gemma", dict(head_dim=8), "sdpa"),
    "gemma2": ("Gemma2", dict(GEMMA, final_logit_softcapping=3.0, attn_logit_softcapping=2.0), "eager"),
    "gemma3": ("Gemma3Text", dict(GEMMA, sliding_window_pattern=3), "sdpa"),
    "phi3": ("Phi3", dict(sliding_window=5), "sdpa"),
    "olmo2": ("Olmo2", {}, "sdpa"),
    "smollm3": ("SmolLM3", dict(no_rope_layer_interval=3), "sdpa"),
    "gpt-neox": ("GPTNeoX", {}, "sdpa"),
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2), "sdpa"),
    "qwen3-moe": ("Qwen3Moe", dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=8), "sdpa"),
}
LC = Supervision(stage="lc", kind="logits", layer=2)
ET = Supervision(stage="et", kind="logits", layer=4, weight=0.5)
SETS = {
    "tft": [],
    "logits": [LC, ET],
    "feature": [replace(LC, kind="feature"), replace(ET, kind="feature")],
    "mixed": [
        replace(LC, layer=1, final_norm=False, update_head=True),
        replace(LC, layer=4, weight=0.3),
        replace(LC, layer=3, alignment="positional", update_head=True),
        replace(ET, layer=2, update_head=True),
        replace(ET, alignment="positional", weight=0.7),
        replace(LC, kind="feature", layer=5, pooling="last", english_gradient=True),
        replace(ET, kind="feature", layer=1, english_gradient=True),
    ],
}


def tiny_model(name: str, dtype: torch.dtype = torch.float32):
    family, extra, attention = ARCHITECTURES[name]
    config = getattr(transformers, f"{family}Config")(**{**TINY, **extra})
    torch.manual_seed(0)
    no_fp64_kernel = dtype is torch.float64 and "experts" in str(extra)
    kwargs = dict(experts_implementation="eager") if no_fp64_kernel else {}
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention, **kwargs).to(dtype).train()
    with torch.no_grad():  # away from the nearly linear initialisation
        for p in model.parameters():
            p.mul_(4) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
    return model


def examples(seed: int = 0, n: int = 4) -> list[TokenizedExample]:
    """Ragged in every field; the answers of the last one are cut to a single token."""
    g = torch.Generator().manual_seed(seed)
    ids = lambda low, high: torch.randint(3, 97, (int(torch.randint(low, high, (1,), generator=g)),), generator=g).tolist()
    whole = [TokenizedExample(ids(3, 14), ids(2, 12), ids(2, 13), ids(2, 10)) for _ in range(n)]
    return [*whole[:-1], whole[-1]._replace(y_tgt=whole[-1].y_tgt[:1], y_en=whole[-1].y_en[:1])]


def padded(batch: list[TokenizedExample]) -> dict[str, torch.Tensor]:
    """The batch with five columns of padding more than it needs, which are an ordinary token to the model."""
    return {k: F.pad(v, (0, 5), value=False if v.dtype == torch.bool else 7) for k, v in collate(batch, 7).items()}


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def relative_error(a: dict, b: dict) -> float:
    """The largest difference of any entry, relative to the largest entry of that parameter's gradient (of all, where it is 0)."""
    scale = max(float(g.abs().max()) for g in b.values())
    return max(float((a[n] - b[n]).abs().max()) / max(float(b[n].abs().max()), 1e-3 * scale) for n in b)


# ---------------------------------------------------------------------------------------------------------------- oracle
def oracle(model, batch: list[TokenizedExample], supervisions: list[Supervision]) -> dict[str, torch.Tensor]:
    """The definition, one example and one loss at a time, each with a full forward pass of its own and all its logits."""
    norm = next(m for name, m in model.named_modules() if name in ("model.norm", "gpt_neox.final_layer_norm"))
    weight, cap = model.lm_head.weight, getattr(model.config, "final_logit_softcapping", None)

    def states(ids):
        return [h[0] for h in model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states]

    def token_losses(h, labels, weight, capped):
        logits = h @ weight.T
        if cap is not None and capped:
            logits = cap * torch.tanh(logits / cap)
        return -torch.log_softmax(logits, -1)[range(len(labels)), labels]

    def logits_loss(e, s):
        if s.alignment == "teacher_forced":
            english = e.x_en if s.stage == "lc" else e.y_en
            h, labels = states(e.x_tgt + english)[s.layer][len(e.x_tgt) - 1 : -1], english
        elif s.stage == "lc":
            n = min(len(e.x_tgt), len(e.x_en))
            h, labels = states(e.x_tgt + e.y_tgt)[s.layer][: n - 1], e.x_en[1:n]
        else:
            n = min(len(e.y_tgt), len(e.y_en))
            h, labels = states(e.x_tgt + e.y_tgt)[s.layer][len(e.x_tgt) - 1 :][:n], e.y_en[:n]
        frozen = {k: v if s.update_head else v.detach() for k, v in norm.named_parameters()}
        h = functional_call(norm, frozen, (h,)) if s.final_norm else h
        return token_losses(h, labels, weight if s.update_head else weight.detach(), s.final_norm)

    def feature_loss(e, s):
        h_tgt = states(e.x_tgt)[s.layer]
        h_en = states(e.x_en)[-1 if s.stage == "et" else s.layer]
        h_tgt, h_en = (h.mean(0) if s.pooling == "mean" else h[-1] for h in (h_tgt, h_en))
        h_en = h_en if s.english_gradient else h_en.detach()
        return 1 - (h_tgt @ h_en / h_tgt.norm() / h_en.norm())[None]

    def tft_loss(e):
        return token_losses(states(e.x_tgt + e.y_tgt)[-1][len(e.x_tgt) - 1 : -1], e.y_tgt, weight, True)

    out = {"tft": torch.cat([tft_loss(e) for e in batch]).mean()}
    out |= {"loss": out["tft"], "lc": 0 * out["tft"], "et": 0 * out["tft"]}
    for s in supervisions:
        value = torch.cat([(logits_loss if s.kind == "logits" else feature_loss)(e, s) for e in batch]).mean()
        out |= {s.stage: out[s.stage] + value, "loss": out["loss"] + s.weight * value}
    return out


@pytest.fixture
def true_double(monkeypatch):
    """transformers computes norms, rotary angles and eager softmax in fp32 even in an fp64 model; here they are in fp64 too."""
    to, softmax = torch.Tensor.to, F.softmax
    double = lambda args: [torch.float64 if a is torch.float32 else a for a in args]
    keywords = lambda kwargs: {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: to(self, *double(args), **keywords(kwargs)))
    monkeypatch.setattr(F, "softmax", lambda *args, **kwargs: softmax(*args, **keywords(kwargs)))


def check_against_oracle(model, batch: list[TokenizedExample], tensors: dict[str, torch.Tensor], tolerance: float) -> None:
    """Losses and the gradient of every parameter, for each list of supervisions on each path."""
    for supervisions in SETS.values():
        expected = oracle(model, batch, supervisions)
        expected_gradients = gradients(model, expected["loss"])
        for path in PATHS:
            actual = dsft_loss(model, tensors, supervisions, path)
            for key in ("loss", "tft", "lc", "et"):
                torch.testing.assert_close(actual[key], expected[key], rtol=tolerance, atol=tolerance / 100)
            assert relative_error(gradients(model, actual["loss"]), expected_gradients) < tolerance, path


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exact_in_fp64(name, true_double):
    """With the order of the batch reversed and padding added."""
    batch = examples()
    check_against_oracle(tiny_model(name, torch.float64), batch, padded(batch[::-1]), 1e-10)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exact_in_fp32(name):
    """The models as they are: fp32, the usual kernels, another draw of lengths."""
    batch = examples(seed=1, n=5)
    check_against_oracle(tiny_model(name), batch, collate(batch, 0), 1e-5)


# ------------------------------------------------------------------------------------------------------------ invariances
@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama", torch.float64)


def same(a: dict, b: dict) -> bool:
    return all(torch.allclose(a[key], b[key], rtol=1e-7, atol=1e-9) for key in ("loss", "tft", "lc", "et"))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", SETS)
def test_batch_order_and_padding_do_not_matter(llama, kind, path):
    batch = examples()
    expected = dsft_loss(llama, collate(batch, 0), SETS[kind], path)
    assert same(dsft_loss(llama, collate(batch[::-1], 0), SETS[kind], path), expected)
    assert same(dsft_loss(llama, padded(batch), SETS[kind], path), expected)


@pytest.mark.parametrize("path", PATHS)
def test_answers_cut_to_one_token(llama, path):
    batch = [e._replace(y_tgt=e.y_tgt[:1], y_en=e.y_en[:1]) for e in examples()]
    for supervisions in SETS.values():
        assert same(dsft_loss(llama, collate(batch, 0), supervisions, path), oracle(llama, batch, supervisions))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ("llama", "llama-tied", "gemma2"))
def test_inner_loss_leaves_head_and_norm_alone(name, path):
    model = tiny_model(name)
    out = dsft_loss(model, collate(examples(), 0), [LC, ET, replace(LC, layer=LAYERS)], path)
    got = gradients(model, out["lc"] + out["et"])
    assert got["model.norm.weight"].abs().max() == 0
    assert got["model.embed_tokens.weight"].abs().max() > 0
    if name == "llama":
        assert got["lm_head.weight"].abs().max() == 0
    else:  # one tensor: what it gets, it gets as the input embedding, so tokens that are no input get nothing
        batch = collate(examples(), 0)
        inputs = torch.cat([batch[k][batch[f"{k}_mask"]] for k in ("x_tgt", "x_en", "y_en")]).unique()
        others = torch.ones(97, dtype=torch.bool)
        others[inputs] = False
        assert got["model.embed_tokens.weight"][others].abs().max() == 0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ("logits", "feature"))
def test_layers_above_get_no_gradient(llama, kind, path):
    out = dsft_loss(llama, collate(examples(), 0), [replace(LC, kind=kind), replace(ET, kind=kind)], path)
    for key, layer in (("lc", LC.layer), ("et", ET.layer)):
        llama.zero_grad()
        out[key].backward(retain_graph=True)
        reached = [any(p.grad is not None and p.grad.abs().max() > 0 for p in block.parameters()) for block in llama.model.layers]
        assert reached == [True] * layer + [False] * (LAYERS - layer)


@pytest.mark.parametrize("path", PATHS)
def test_feature_loss_of_identical_texts_is_zero(llama, path):
    batch = collate([e._replace(x_en=e.x_tgt) for e in examples()], 0)
    for pooling in ("mean", "last"):
        lc = replace(LC, kind="feature", pooling=pooling)
        et = replace(ET, kind="feature", layer=LAYERS, pooling=pooling)
        out = dsft_loss(llama, batch, [lc, et], path)
        assert out["lc"].abs() < 1e-12 and out["et"].abs() < 1e-12
        assert max(g.abs().max() for g in gradients(llama, out["lc"] + out["et"]).values()) < 1e-9


@pytest.mark.parametrize("path", PATHS)
def test_last_layer_is_not_normed_twice(llama, path):
    """At k = L, ET-logits on y_tgt itself is TFT: the state that W_out reads is norm(h_L), whichever way it is asked for."""
    batch = collate([e._replace(y_en=e.y_tgt) for e in examples()], 0)
    for final_norm, alignment in itertools.product((True, False), ("teacher_forced", "positional")):
        s = replace(ET, layer=LAYERS, update_head=True, final_norm=final_norm, alignment=alignment)
        out = dsft_loss(llama, batch, [s], path)
        torch.testing.assert_close(out["et"], out["tft"])


def test_truncated_passes_run_in_the_order_of_the_losses(llama, monkeypatch):
    """The same on every process: under FSDP all of them gather a layer together, and gradients add up in this order."""
    ran, forward_pass = [], dsft.losses.forward_pass

    def recorded(backbone, batch, segments, layers, depth):
        ran.append(segments)
        return forward_pass(backbone, batch, segments, layers, depth)

    monkeypatch.setattr("dsft.losses.forward_pass", recorded)
    for first, second in itertools.permutations(((LC, "x_en"), (ET, "y_en"))):
        ran.clear()
        dsft_loss(llama, collate(examples(), 0), [first[0], second[0]], "truncated")
        assert ran == [("x_tgt", segment) for segment in ("y_tgt", first[1], second[1])]


def test_weight_zero_is_absence(llama):
    batch, out = collate(examples(), 0), {}
    for key, supervisions in {"without": [LC], "zero": [LC, replace(ET, weight=0.0)]}.items():
        out[key] = dsft_loss(llama, batch, supervisions)
        out[key]["gradients"] = gradients(llama, out[key]["loss"])
    assert same(out["zero"], out["without"]) and out["zero"]["et"] == 0
    assert all(torch.equal(g, out["without"]["gradients"][n]) for n, g in out["zero"]["gradients"].items())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # the new name came after the oldest version served
@pytest.mark.parametrize("name", ("llama", "mistral", "gemma2"))
def test_gradient_checkpointing_composes(name, true_double):
    model, batch = tiny_model(name, torch.float64), collate(examples(), 0)
    for path in PATHS:
        plain = gradients(model, dsft_loss(model, batch, SETS["mixed"], path)["loss"])
        model.gradient_checkpointing_enable()
        assert relative_error(gradients(model, dsft_loss(model, batch, SETS["mixed"], path)["loss"]), plain) < 1e-10
        model.gradient_checkpointing_disable()


def test_gradient_norms_add_up(llama):
    batch = collate(examples(), 0)
    alone = gradient_norms(llama, batch, [LC])
    total = torch.stack([g.norm() for g in gradients(llama, dsft_loss(llama, batch, [])["loss"]).values()]).norm()
    assert alone[0] == pytest.approx(float(total)) and len(alone) == 2
    assert gradient_norms(llama, batch, [replace(LC, weight=3.0)])[1] == pytest.approx(3 * alone[1])


@pytest.mark.parametrize("softcap", (None, 3.0))
def test_chunked_head_is_exact(softcap, monkeypatch):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (23, 50))
    labels = torch.randint(50, (23,))
    logits = hidden @ weight.T if softcap is None else softcap * torch.tanh(hidden @ weight.T / softcap)
    expected = F.cross_entropy(logits, labels, reduction="sum")
    expected_gradients = torch.autograd.grad(0.3 * expected, (hidden, weight))
    for chunk in (1, 50 * 7, 50 * 100):  # one row at a time, an uneven split, all at once
        monkeypatch.setattr("dsft.head.LOGITS_PER_CHUNK", chunk)
        actual = summed_nll(hidden, weight, labels, softcap)
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(0.3 * actual, (hidden, weight)), expected_gradients, rtol=1e-11, atol=1e-13
        )
    assert summed_nll(hidden[:0], weight, labels[:0], softcap) == 0


# --------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("T5", dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2), "encoder-decoder"),
        ("Cohere", {}, "logits"),
        ("Granite", dict(logits_scaling=8.0), "logits"),
        ("Phi", {}, "without bias"),
        ("Mamba", {}, "hidden_states"),
    ],
)
def test_unsupported_architecture_is_refused_by_name(family, config, reason):
    config = getattr(transformers, f"{family}Config")(**{**TINY, **config})
    model_class = transformers.AutoModelForSeq2SeqLM if family == "T5" else transformers.AutoModelForCausalLM
    model = model_class.from_config(config)
    for path in (*PATHS, "auto"):
        with pytest.raises(UnsupportedArchitecture, match=f"{family}.*{reason}"):
            dsft_loss(model, collate(examples(), 0), [LC], path)


def test_model_without_packing_falls_back_and_warns_why(caplog):
    config = transformers.BloomConfig(
        vocab_size=97, hidden_size=32, n_layer=LAYERS, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model, batch = transformers.AutoModelForCausalLM.from_config(config), collate(examples(), 0)
    dsft.losses._say_once.cache_clear()
    with caplog.at_level("WARNING", logger="dsft"):
        for supervisions in ([replace(LC, kind="feature")], [LC], [LC]):  # nothing to pack in the first; the last is no news
            dsft_loss(model, batch, supervisions)
    assert [record.getMessage() for record in caplog.records] == [
        "BloomForCausalLM: path truncated (BloomModel computes its attention in a way of its own)"
    ]
    backbone = find_backbone(model)
    assert choose_path(backbone, terms_of([LC], LAYERS), "auto") == ("truncated", one_pass_obstacle(backbone))
    assert choose_path(backbone, terms_of([replace(LC, kind="feature")], LAYERS), "auto")[0] == "one_pass"
    with pytest.raises(ValueError, match="one_pass.*BloomModel"):
        dsft_loss(model, batch, [LC], "one_pass")
    for supervisions in SETS.values():
        expected = dsft_loss(model, batch, supervisions, "naive")
        actual = dsft_loss(model, batch, supervisions, "auto")
        torch.testing.assert_close(actual["loss"], expected["loss"])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("defect", ("window", "branches", "position"))
def test_the_probe_notices_wrong_packing(monkeypatch, dtype, defect):
    """One pass is allowed by trial, so the trial must fail if one of the three things that go wrong silently does."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.MistralConfig(**TINY, sliding_window=4096)).to(dtype)
    assert one_pass_obstacle(find_backbone(model)) is None
    honest = dsft.backbone.packed_hidden_states

    def defective(backbone, input_ids, position_ids, visible, layers, kept):
        if defect == "branches":
            visible = torch.ones_like(visible).tril()
        elif defect == "position":
            position_ids = torch.arange(position_ids.shape[1]).expand_as(position_ids)
        return honest(backbone, input_ids, position_ids, visible, layers, kept)

    monkeypatch.setattr("dsft.backbone.packed_hidden_states", defective)
    if defect == "window":
        monkeypatch.setattr("dsft.backbone.attention_windows", lambda backbone: [None] * LAYERS)
    dsft.backbone._probed.clear()
    assert one_pass_obstacle(find_backbone(model)) == "packed branches change the states of MistralForCausalLM"
    dsft.backbone._probed.clear()


@pytest.mark.parametrize("layer", (LAYERS + 1, "i"))
def test_layer_out_of_range(llama, layer):
    with pytest.raises(ValueError, match=rf"layer '?{layer}'? .*1..{LAYERS}"):
        dsft_loss(llama, collate(examples(), 0), [replace(LC, layer=layer)])


@pytest.mark.parametrize("update", ["hidden", "weight", "both"])
def test_float16_gradients_are_divided_before_they_are_cast(update):
    """One large dimension of the state and a label in two alike: the sum over the tokens is far beyond float16, their mean is not."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(8192, 64), torch.randn(500, 64) * 0.02, torch.randint(500, (8192,))
    hidden[:, 0], weight[:, 0], labels[:4096] = 30.0, weight[:, 0] * 0.01, 5
    gradients = []
    for mean in (lambda h, w: F.cross_entropy(F.linear(h, w).float(), labels), lambda h, w: summed_nll(h, w, labels) / len(labels)):
        inputs = [hidden.clone().requires_grad_(update != "weight"), weight.clone().requires_grad_(update != "hidden")]
        with torch.autocast("cpu", dtype=torch.float16):
            loss = mean(*inputs)
        (loss * 1024).backward()
        gradients.append([t.grad for t in inputs if t.grad is not None])
    for ours, theirs in zip(gradients[1], gradients[0], strict=True):
        assert ours.dtype == theirs.dtype == torch.float32 and torch.isfinite(ours).all()
        assert (ours - theirs).norm() < 2e-3 * theirs.norm()


def test_float16_of_the_model_itself():
    """Without autocast, too; a gradient of one token keeps what float16 has no number for until the loss scale has raised it."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(8, 16), torch.randn(50, 16) * 0.1, torch.randint(50, (8,))
    half = [t.half().requires_grad_() for t in (hidden, weight)]
    whole = [t.half().float().requires_grad_() for t in (hidden, weight)]
    for scale in (1.0, 2.0**14):
        ours, exact = (torch.autograd.grad(summed_nll(*inputs, labels) / 8 * scale, inputs) for inputs in (half, whole))
        for one, other in zip(ours, exact):
            assert one.dtype == torch.float16
            torch.testing.assert_close(one.float(), other, rtol=4e-3, atol=1e-3 * scale / 8)


def test_what_bf16_and_fp32_gave_they_give():
    """The order of operations: in bf16 the sums are cast, then divided; in fp32 nothing is cast."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(40, 16), torch.randn(50, 16), torch.randint(50, (40,))
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        summed = torch.autograd.grad(summed_nll(*inputs, labels), inputs)
        mean = torch.autograd.grad(summed_nll(*inputs, labels) / 7, inputs)
        for one, other in zip(mean, summed):
            assert torch.equal(one, other * torch.tensor(1 / 7).to(dtype))


def test_a_row_beyond_the_positions_is_refused():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**TINY, max_position_embeddings=20))
    row = {"x_tgt": [5] * 12, "y_tgt": [5] * 8, "x_en": [6] * 8, "y_en": [7] * 8}
    assert torch.isfinite(dsft_loss(model, collate([TokenizedExample(**row)], 0), SETS["logits"])["loss"])
    for field, supervisions in (("y_tgt", []), ("x_en", SETS["logits"]), ("y_en", SETS["logits"])):
        longer = collate([TokenizedExample(**row | {field: [5] * 9})], 0)
        with pytest.raises(ValueError, match=rf"x_tgt \+ {field} has 21 tokens, but LlamaForCausalLM has 20 positions"):
            dsft_loss(model, longer, supervisions)
    wide = collate([TokenizedExample(**row | {"x_en": [6] * 19}), TokenizedExample(*([5] * 1,) * 4)], 0)
    assert torch.isfinite(dsft_loss(model, wide, SETS["feature"])["loss"])  # x_en by itself fits


@pytest.mark.parametrize("kind", ("logits", "feature"))
@pytest.mark.parametrize("name", ("llama-tied", "gemma2", "gpt-neox"))
def test_a_loss_that_does_not_train_the_embeddings_trains_the_layers_as_ever(name, kind, true_double):
    model, batch = tiny_model(name, torch.float64), collate(examples(), 0)
    lc = replace(LC, kind=kind, english_gradient=kind == "feature")
    table = next(name for name, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    for path in PATHS:
        plain, stopped = (dsft_loss(model, batch, [replace(lc, update_embeddings=wanted)], path) for wanted in (True, False))
        assert [stopped[name].item() for name in ("tft", "lc")] == pytest.approx([plain[name].item() for name in ("tft", "lc")], rel=1e-12)
        free, kept = (gradients(model, out["lc"]) for out in (plain, stopped))
        assert free.pop(table).abs().max() > 0 and not kept.pop(table).any()
        assert relative_error(kept, free) < 1e-10
        both = gradients(model, dsft_loss(model, batch, [replace(lc, update_embeddings=False), ET], path)["loss"])
        alone = gradients(model, dsft_loss(model, batch, [ET], path)["loss"])
        assert relative_error({table: both[table]}, {table: alone[table]}) < 1e-10  # LC added nothing to it
