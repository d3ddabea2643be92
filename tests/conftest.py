"""What several test files share: the real Alpaca pieces, models fine-tuned on them, each trained once a session, and small projects made by hand."""

import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="dsft-datasets-"))  # before anything imports datasets

import nbformat  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "real"  # pieces of public data; nothing of it is in the project


def alpaca(lang: str) -> str:
    """The path of the real Alpaca piece in a language; skips the test where there is none."""
    path = REAL / "alpaca" / f"alpaca_{lang}.json"
    if not path.exists():
        pytest.skip(f"the real Alpaca pieces are not there ({os.path.relpath(path, ROOT)})")
    return str(path)


def seq2seq(folder: Path) -> str:
    """A tiny translation model of random weights that knows bytes, saved in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<pad>", "</s>", "eng_Latn", "vie_Latn"]
    vocab = {word: n for n, word in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", additional_special_tokens=special[2:], model_max_length=256
    )
    torch.manual_seed(0)
    sizes = dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    config = transformers.T5Config(vocab_size=len(vocab), decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **sizes)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def small_study(folder: Path, *methods: str | dict, **train):
    """A study of sixteen examples in Chinese and the shipped base: a training takes seconds."""
    from dsft.study import Study

    return Study(
        name="small",
        models={"micro-llama": {"path": str(ROOT / "models" / "micro-llama")}},
        languages=["zh"],
        methods=methods,
        data={"items": 16},
        train={"batch_size": 8, "per_device_batch_size": 4, "epochs": 1, "learning_rate": 1e-3, "bf16": False, "logging_steps": 1} | train,
        runs=str(folder),
    )


@pytest.fixture(scope="session")
def train_on_alpaca(tmp_path_factory) -> Callable:
    """A function (lang, method) -> (run, trainer) that trains the microcosm's base 20 steps on real Alpaca, English and that language.

    The run is as a study leaves it: `run.trained` is the model's folder. Trained once a session.
    """
    from dsft.files import write_jsonl
    from dsft.study import Study, load_recipe
    from dsft.training import fine_tune, recipe_options, save_training

    folder = tmp_path_factory.mktemp("alpaca")

    @cache
    def train(lang: str, method: str):
        files = {name: alpaca(name) for name in ("en", "zh", "vi")}
        study = Study(
            name="alpaca",
            models={"micro-llama": {"path": str(ROOT / "models" / "micro-llama")}},
            languages=["zh", "vi"],
            methods=["sft", "tft", "sdrrl", "dsft_logits", "dsft_feature"],
            layers={"i": 2, "j": 5},
            data={"source": "files", "files": files, "items": 96, "template": "alpaca", "max_length": 256, "max_dropped": 0.3},
            train={"max_steps": 20, "batch_size": 2, "per_device_batch_size": 2, "learning_rate": 1e-3, "bf16": False, "logging_steps": 5},
            recipes={"sdrrl": {"rouge_l": 0.0, "code_switch": 0.0, "max_new_tokens": 8, "translator": seq2seq(folder / "translator")}},
            runs=str(folder / "runs"),
        )
        run = study.run("micro-llama", lang, method, 0)
        if method.startswith("dsft"):
            run.layers_file.parent.mkdir(parents=True, exist_ok=True)
            run.layers_file.write_text('{"i": 2, "j": 5}', encoding="utf-8")
        if run.method.recipes:
            rows, _ = load_recipe("sdrrl").rows(run, recipe_options(study, "sdrrl"))
            write_jsonl(run.recipe_rows, [{"recipe": "sdrrl"} | row for row in rows])
        trainer = fine_tune(run)
        save_training(run, trainer, 0.0, "pytest")
        return run, trainer

    return train


def write_files(files: dict[str, str | list[str]]) -> None:
    """Write files below the current folder: of a notebook the sources of its code cells are given, of everything else the text."""
    for name, content in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".ipynb":
            nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in content]), path)
        else:
            path.write_text(content, encoding="utf-8")


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project without any code yet, which is also the current folder."""
    monkeypatch.chdir(tmp_path)
    write_files({"settings.ini": "", "dsft/__init__.py": "", "dsft/recipes/__init__.py": ""})
    return tmp_path
