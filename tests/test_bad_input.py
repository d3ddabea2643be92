"""Every kind of bad input ends in one line that says where, what and what to do, before anything is computed or written.

BAD is the list: the kind, what it does to a folder of good files, what the line must say (parts between bars), and fields of `data` that go with it. The
good folder is a study on files: study.yaml, instruction data en.json and zh.json, what SDRRL needs. The benchmarks' own kinds stand in test_tasks.BROKEN and
run here as well.
"""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_tasks import BROKEN, data_dir, test_a_broken_file_is_one_line  # noqa: F401

from dsft.checks import check
from dsft.data import parallel_rows
from dsft.files import ParamsError, load_model, python_code
from dsft.generation import load_generator
from dsft.settings import DataParams
from dsft.study import Study, load_study
from dsft.training import fine_tune

ENGLISH = [{"id": n, "instruction": f"What is {n} and {n}?", "input": "", "output": f"That is {2 * n}."} for n in range(20)]
CHINESE = [{"id": n, "instruction": f"{n}加{n}等于几?", "input": "", "output": f"等于{2 * n}。"} for n in range(20)]
STUDY = {
    "models": {"micro-llama": {"path": "models/micro-llama"}},
    "languages": ["zh"],
    "methods": ["tft", "sdrrl"],
    "data": {"source": "files", "files": {"en": "FOLDER/en.json", "zh": "FOLDER/zh.json"}, "template": "alpaca"},
    "train": {"batch_size": 4, "per_device_batch_size": 4},
    "recipes": {"sdrrl": {"dictionaries": {"zh": "FOLDER/dictionary.txt"}, "translations": {"zh": "FOLDER/translations.jsonl"}}},
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    for name, rows in (("en.json", ENGLISH), ("zh.json", CHINESE)):
        (folder / name).write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (folder / "dictionary.txt").write_text("two 二\nand\t和\n", encoding="utf-8")
    (folder / "translations.jsonl").write_text('{"en": "Yes.", "translation": "是。"}\n', encoding="utf-8")
    (folder / "sentences.en").write_text("One.\nTwo.\n", encoding="utf-8")
    (folder / "sentences.zh").write_text("一。\n", encoding="utf-8")
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    return folder


# ---- ways to break it
def raw(name, change):
    """Change the bytes of a file."""

    def do(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return do


def rows(name, change):
    """Change the rows of a JSON file: `change` returns new ones, or works on them in place."""

    def do(folder):
        items = json.loads((folder / name).read_text(encoding="utf-8"))
        items = change(items) or items
        (folder / name).write_text(json.dumps(items, ensure_ascii=False), encoding="utf-8", errors="backslashreplace")

    return do


def row(name, n, **fields):
    """Set fields of one row."""
    return rows(name, lambda items: items[n].update(fields))


def without(name, n, field):
    return rows(name, lambda items: items[n].pop(field) and None)


def study(part="", **fields):
    """Set fields of the study file, or of a part of it."""

    def do(folder):
        content = yaml.safe_load((folder / "study.yaml").read_text(encoding="utf-8"))
        where = content
        for name in part.split(".") if part else ():
            where = where.setdefault(name, {})
        where.update(fields)
        (folder / "study.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")

    return do


def moved(name, to):
    return lambda folder: shutil.move(folder / name, folder / to)


def copied(name, to):
    return lambda folder: shutil.copy(folder / name, folder / to)


def all_of(*changes):
    def do(folder):
        for change in changes:
            change(folder)

    return do


BAD = [
    # instruction data: the file
    ("truncated JSON", raw("zh.json", lambda b: b[: len(b) // 2]), "zh.json: not readable as json: line 1|the file breaks off|fetch the file again"),
    ("JSON with a comma too many", raw("zh.json", lambda b: b.replace(b"},", b"},,", 1)), "zh.json: not readable|line 1, column|mend"),
    ("another encoding", raw("zh.json", lambda b: b.decode().encode("gb18030")), "zh.json: line 1, byte|not UTF-8|iconv"),
    ("UTF-16", raw("zh.json", lambda b: b.decode().encode("utf-16")), "zh.json: not UTF-8 (UTF-16|iconv"),
    ("zero bytes", raw("zh.json", lambda b: b + b"\0" * 9), "zh.json: not UTF-8 (UTF-16, or zero bytes)|convert"),
    ("empty file", raw("zh.json", lambda b: b""), "zh.json: the file is empty|fetch it again"),
    ("empty list", raw("zh.json", lambda b: b"[]"), "zh.json: no rows|fetch it again"),
    ("an object, not a list", raw("zh.json", lambda b: b'{"zh": 1}'), "zh.json: no field for instruction|a list of objects"),
    ("a list of numbers", raw("zh.json", lambda b: b"[1, 2, 3]"), "zh.json: row 1 is int|a list of objects"),
    ("one row that is none", rows("zh.json", lambda items: items[:3] + [["a"]] + items[4:]), "zh.json: row 4 is list|a list of objects"),
    ("nested without end", raw("zh.json", lambda b: b"[" * 100_000), "zh.json: not readable as json: line 1|nested too deep"),
    ("a web page", raw("zh.json", lambda b: b"<!DOCTYPE html><html>"), "zh.json: a web page, not JSON|fetch the file itself"),
    ("a Git LFS pointer", raw("zh.json", lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "zh.json: only a Git LFS pointer|git lfs pull"),
    ("missing file", moved("zh.json", "elsewhere.json"), "data.files.zh = '|zh.json': no such file|relative to the project"),
    ("JSON Lines cut off", all_of(raw("zh.json", lambda b: "\n".join(json.dumps(r) for r in CHINESE).encode()[:-9]), moved("zh.json", "zh.jsonl"), study("data", source="files", files={"en": "FOLDER/en.json", "zh": "FOLDER/zh.jsonl"})), "zh.jsonl: not readable as json: line 20|the file breaks off"),
    ("JSON called parquet", all_of(copied("zh.json", "zh.parquet"), study("data", files={"en": "FOLDER/en.json", "zh": "FOLDER/zh.parquet"})), "zh.parquet: not readable as parquet|fetch the file again"),
    # instruction data: rows
    ("another language", copied("en.json", "zh.json"), "zh.json: given as data.files.zh, but|Latin|give the right file"),
    ("swapped languages", all_of(moved("en.json", "x"), moved("zh.json", "en.json"), moved("x", "zh.json")), "zh.json: given as data.files.zh, but|give the right file"),
    ("Chinese as Arabic", study(languages=["ar"], data={"source": "files", "files": {"en": "FOLDER/en.json", "ar": "FOLDER/zh.json"}}, recipes={}), "zh.json: given as data.files.ar, but|Arabic letters; the letters are mostly Han"),
    ("never translated row", row("zh.json", 4, instruction="What is 4 and 4?", output="That is 8."), "zh.json: 1 of 20 rows unusable|not a letter of zh (first: row 5)|mend these rows or raise data.max_dropped", {"max_dropped": 0}),
    ("field absent in all rows", rows("zh.json", lambda items: [{"id": r["id"], "text": r["output"]} for r in items]), "zh.json: no field for instruction ('instruction') and output ('output')|data.files.zh.fields"),
    ("field absent in one row", without("zh.json", 6, "output"), "zh.json: output is missing (first: row 7)", {"max_dropped": 0}),
    ("null", row("zh.json", 6, instruction=None), "zh.json: instruction is missing (first: row 7)", {"max_dropped": 0}),
    ("empty answer", row("zh.json", 6, output=" \n"), "zh.json: output is empty (first: row 7)", {"max_dropped": 0}),
    ("a number for text", row("zh.json", 6, output=12), "zh.json: output is not text (first: row 7)", {"max_dropped": 0}),
    ("a list for text", row("zh.json", 6, output=["十二"]), "zh.json: output is not text (first: row 7)", {"max_dropped": 0}),
    ("an object for the input", row("zh.json", 6, input={"a": 1}), "zh.json: input is not text (first: row 7)", {"max_dropped": 0}),
    ("100,000 characters", row("zh.json", 6, output="等" * 100_000), "zh.json: output has more than 20000 characters (first: row 7)", {"max_dropped": 0}),
    ("decoded wrongly before", row("zh.json", 6, output="等\ufffd于"), "zh.json: output was decoded wrongly (it holds U+FFFD) (first: row 7)", {"max_dropped": 0}),
    ("half a surrogate pair", row("zh.json", 6, output="等于十二 \ud83d"), "zh.json: output is no valid Unicode (it holds half of a surrogate pair) (first: row 7)", {"max_dropped": 0}),
    ("a zero-width answer", row("zh.json", 6, output="\u200b\ufeff"), "zh.json: output is empty (first: row 7)", {"max_dropped": 0}),
    ("no row is left", rows("zh.json", lambda items: [r.update(output="\u3000") for r in items] and items), "zh.json: 20 of 20 rows unusable and no example is left: 20 x|output is empty|mend these rows", {"max_dropped": 1.0}),
    ("missing id", without("zh.json", 6, "id"), "zh.json: id is missing (first: row 7)", {"max_dropped": 0}),
    ("duplicate id", row("zh.json", 6, id=5), "zh.json: id stands twice (first: row 6)", {"max_dropped": 0}),
    ("one row fewer, by id", rows("zh.json", lambda items: items[1:]), "en.json: no partner in|zh.json (first: row 1)", {"max_dropped": 0}),
    ("one row fewer, by position", rows("zh.json", lambda items: items[1:]), "zh.json: not parallel with|en.json: 19 and 20 rows|the same length", {"join": "position"}),
    ("joined by ids that are not there", rows("en.json", lambda items: [r.pop("id") for r in items] and items), "en.json: no row has an id ('id')|join: position", {"join": "id"}),
    ("ids of another table", rows("zh.json", lambda items: [r.update(id=r["id"] + 100) for r in items] and items), "zh.json: 40 of 40 rows unusable|no partner in"),
    ("an example twice", all_of(rows("zh.json", lambda i: i + [i[3] | {"id": 99}]), rows("en.json", lambda i: i + [i[3] | {"id": 99}])), "en.json: the example stands there twice (first: row 21)", {"max_dropped": 0}),
    ("an answer that runs on", row("zh.json", 6, output="等于十二。" * 200), "zh.json: answer much longer than the English one (first: row 7)", {"max_dropped": 0}),
    ("too many bad rows", rows("zh.json", lambda items: [r.update(output="") for r in items[:3]] and items), "zh.json: 3 of 20 rows unusable, more than data.max_dropped = 0.05|raise data.max_dropped"),
    # the study file
    ("YAML that is none", raw("study.yaml", lambda b: b + b"\n: ["), "study.yaml: not readable as YAML"),
    ("a list for a study", raw("study.yaml", lambda b: b"- a\n- b\n"), "study.yaml: the file must hold fields and values"),
    ("an unknown field", study("data", max_lenght=3), "study.yaml: data.max_lenght = 3: unknown field|correct its name"),
    ("a wrong type", study("train", learning_rate="fast"), "study.yaml: train.learning_rate = 'fast'"),
    ("an unknown method", study(methods=["dfst"]), "study.yaml: methods.0 = 'dfst': no method of that name; choose from"),
    ("a language without data", study(languages=["vi"]), "study.yaml: languages: vi has no data as a target language"),
    ("Norwegian without quotes", raw("study.yaml", lambda b: b.replace(b"languages:\n- zh", b"languages: [zh, no]")), "study.yaml: not readable as YAML|no is a truth value to YAML, not text; quote it: 'no'"),
    ("Norwegian data without quotes", raw("study.yaml", lambda b: b.replace(b"    zh: FOLDER/zh.json", b"    no: FOLDER/zh.json")), "study.yaml: not readable as YAML|the key no is a truth value to YAML, not text; quote it: 'no'"),
    ("a Norwegian dictionary without quotes", raw("study.yaml", lambda b: b.replace(b"      zh: FOLDER/dictionary.txt", b"      No: FOLDER/dictionary.txt")), "the key No is a truth value to YAML, not text; quote it: 'No'"),
    ("a Norwegian configuration without quotes", study("data", files={"en": "FOLDER/en.json", "zh": {"hub": "a/b", "name": False}}), "study.yaml: data.files.zh.name = False: |to YAML no, off, yes and on are truth values: quote what is text, 'no'"),
    ("one language without quotes", study(languages=False), "study.yaml: languages = False: |quote what is text, 'no'"),
    ("a model called by a number", raw("study.yaml", lambda b: b.replace(b"  micro-llama:", b"  7:")), "the key 7 is a number to YAML, not text; quote it: '7'"),
    ("a commit of digits", study("data", files={"en": "FOLDER/en.json", "zh": {"hub": "a/b", "revision": 1234567}}), "study.yaml: data.files.zh.revision = 1234567: |quote it: '1234567'"),
    ("a key twice", raw("study.yaml", lambda b: b + b"train: {batch_size: 16}\n"), "study.yaml: not readable as YAML: line|the key 'train' stands twice in one block; keep one of them"),
    ("no language tag", study(languages=["zh_simplified"]), "study.yaml: languages.0 = 'zh_simplified': is no language tag; write one such as zh, zh-Hant"),
    ("Persian as Arabic", all_of(rows("zh.json", lambda items: [r.update(instruction=f"پایتخت ایران کجاست؟ {r['id']}", output=f"تهران است. گچ {r['id']}") for r in items] and items), study(languages=["ar"], data={"source": "files", "files": {"en": "FOLDER/en.json", "ar": "FOLDER/zh.json"}}, recipes={})), "zh.json: given as data.files.ar, but 100 % of the rows have letters that Arabic (ar) has not; it looks like Persian (fa); give the right file"),
    ("no English side", study("data", files={"zh": "FOLDER/zh.json"}), "study.yaml: data: `files` needs the English side under the key en"),
    ("a format unknown", study("data", files={"en": "FOLDER/en.csv", "zh": "FOLDER/zh.json"}), "study.yaml: data.files.en: the file's name must end in .json, .jsonl or .parquet"),
    ("a share above one", study("data", max_dropped=1.5), "study.yaml: data.max_dropped = 1.5"),
    ("no steps at all", study("train", max_steps=0), "study.yaml: train: max_steps = 0 trains nothing; give a number of steps, or -1"),
    ("batches that do not divide", study("train", batch_size=6), "study.yaml: train: batch_size = 6 must be a multiple"),
    ("layers out of order", study(layers={"i": 5, "j": 2}), "study.yaml: layers: layer i = 5 must lie below layer j = 2"),
    ("a layer that the model has not", study(layers={"i": 1, "j": 99}), "study.yaml: layers.j = 99: micro-llama has layers 1 to"),
    ("a launcher that is not there", study("train", launch="none.yaml"), "study.yaml: train.launch = 'none.yaml': no such file"),
    ("a model from nowhere", study(models={"a": {"vocabulary": {}}}), "study.yaml: models.a: give `path` (a folder or a name on the hub), `pretrain` or `gguf`"),
    ("a model made twice", study(models={"a": {"pretrain": {}, "gguf": "a.gguf"}}), "study.yaml: models.a: `pretrain` and `gguf` both make the model"),
    ("a GGUF file that is not there", study(models={"a": {"gguf": "models/none.gguf"}}), "models.a.gguf = 'models/none.gguf': no such file"),
    ("a count of no tokens", study("models.micro-llama", vocabulary={"min_count": 0}), "study.yaml: models.micro-llama.vocabulary.min_count = 0"),
    # environment variables in paths
    ("data by a variable that is not set", study("data", files={"en": "${DSFT_NOWHERE}/en.json", "zh": "FOLDER/zh.json"}), "data.files.en = '${DSFT_NOWHERE}/en.json': the environment variable DSFT_NOWHERE is not set; export DSFT_NOWHERE="),
    ("a dictionary by a variable that is not set", study("recipes.sdrrl", dictionaries={"zh": "${DSFT_NOWHERE}/dictionary.txt"}), "sdrrl.dictionaries.zh = '${DSFT_NOWHERE}/dictionary.txt': the environment variable DSFT_NOWHERE is not set"),
    ("benchmarks by a variable that is not set", study("evaluation", source="files", data_dir="${DSFT_NOWHERE}/b", benchmarks=["xcopa"]), "evaluation.data_dir = '${DSFT_NOWHERE}/b': the environment variable DSFT_NOWHERE is not set"),
    ("a GGUF file by a variable that is not set", study(models={"a": {"gguf": "${DSFT_NOWHERE}/a.gguf"}}), "models.a.gguf = '${DSFT_NOWHERE}/a.gguf': the environment variable DSFT_NOWHERE is not set"),
    ("a base by a variable that is not set", study(models={"a": {"path": "${DSFT_NOWHERE}/a"}}), "models.a.path = '${DSFT_NOWHERE}/a': the environment variable DSFT_NOWHERE is not set"),
    # SDRRL
    ("SDRRL's dictionary missing", moved("dictionary.txt", "x"), "sdrrl.dictionaries.zh = |no such file"),
    ("SDRRL's translations missing", moved("translations.jsonl", "x"), "sdrrl.translations.zh = |no such file"),
    ("a word without translation", raw("dictionary.txt", lambda b: b + b"three\n"), "dictionary.txt: line 3: 'three' is not an English and a target word|separate the two"),
    ("a dictionary in another encoding", raw("dictionary.txt", lambda b: b.decode().encode("gb18030")), "sdrrl.dictionaries.zh|not UTF-8|iconv"),
    ("a dictionary without words", raw("dictionary.txt", lambda b: b"\n\n"), "sdrrl.dictionaries.zh = |dictionary.txt': holds no words"),
    ("a translation that is half a character", raw("translations.jsonl", lambda b: b + b'{"en": "No.", "translation": "\\ud83d"}\n'), "translations.jsonl: line 2: not a JSON object with text"),
    ("a translation without its text", raw("translations.jsonl", lambda b: b + b'{"en": "No."}\n'), 'translations.jsonl: line 2: not a JSON object with text in "en" and "translation"|mend'),
    ("no way to translate", study("recipes.sdrrl", translations={}), "sdrrl.translator: none|name a translation model"),
    ("sentences that are not aligned", study("recipes.sdrrl", sentences={"zh": ["FOLDER/sentences.en", "FOLDER/sentences.zh"]}), "sentences.en has 2 lines and|sentences.zh 1|aligned by line"),
    ("no dictionary for a language", study("recipes.sdrrl", dictionaries={}), "sdrrl.dictionaries: none for zh|set recipes.sdrrl.code_switch: 0"),
]  # fmt: skip


def check_in(folder: Path) -> None:
    """The check before the study in `folder`."""
    path = folder / "study.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("FOLDER", str(folder)), encoding="utf-8")
    check(str(path))


def one_line(folder: Path) -> str:
    """What the check before a study says."""
    try:
        check_in(folder)
    except SystemExit as told:
        assert str(told).startswith("dsft: ")
        return str(told)
    raise AssertionError("not refused")


def broken(good: Path, folder: Path, change, data: dict) -> Path:
    shutil.copytree(good, folder / "study")
    change(folder / "study")
    if data:
        study("data", **data)(folder / "study")
    return folder / "study"


def test_a_file_that_a_recipe_does_not_use_need_not_be_there(good, tmp_path, capsys):
    folder = broken(good, tmp_path, moved("dictionary.txt", "x"), {})
    study("recipes.sdrrl", code_switch=0.0)(folder)
    check_in(folder)
    assert "to be fetched" not in capsys.readouterr().out


@pytest.mark.parametrize(("change", "words", "data"), [pytest.param(change, words, (*more, {})[0], id=kind) for kind, change, words, *more in BAD])
def test_bad_input_is_one_line(good, tmp_path, change, words, data):
    folder = broken(good, tmp_path, change, data)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "study.yaml"}
    told = one_line(folder)
    assert "\n" not in told and len(told) < 1200
    assert all(word in told for word in words.split("|")), told
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "study.yaml"} == before


def test_the_good_folder_is_good(good, tmp_path, capsys):
    with pytest.raises(AssertionError, match="not refused"):
        one_line(broken(good, tmp_path, lambda folder: None, {}))
    assert "1 models, languages zh, 2 methods, 2 runs" in capsys.readouterr().out


def test_at_least_forty_kinds():
    kinds = [kind for kind, *_ in BAD]
    assert len(set(kinds)) == len(kinds) >= 40 and len(kinds) + len(BROKEN) >= 54


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (raw("zh.json", lambda b: b"\xef\xbb\xbf" + b), "begins with a byte-order mark, which is ignored"),
        (raw("zh.json", lambda b: b.replace(b"}, ", b"},\r\n")), None),
        (rows("zh.json", lambda items: [item.pop("input") and None for item in items] and items), None),
        (rows("zh.json", lambda items: [item.update(id=str(item["id"]), comment="x") for item in items] and items[::-1]), None),
        (rows("zh.json", lambda items: [item.update(id=float(item["id"])) for item in items] and items), None),
        (rows("zh.json", lambda items: [item.update(id=f"{item['id']}.0") for item in items] and items), None),
        (raw("zh.json", lambda b: "\n".join(json.dumps(item) for item in json.loads(b)).encode()), None),
        (rows("zh.json", lambda items: [item.update(input=(None, " ", "\u3000", float("nan"))[n % 4]) for n, item in enumerate(items)] and items), None),
        (rows("zh.json", lambda items: [item.update(input="<noinput>" if n < 3 else "") for n, item in enumerate(items)] and items), "3 of 20 rows hold a placeholder for no text, such as <noinput>"),
    ],
    ids=["byte-order mark", "Windows line ends", "no input at all", "ids as text, another order, more fields", "ids as fractions", "ids as fractions in text", "a row a line", "blank inputs", "placeholders"],
)
def test_what_does_no_harm_is_read(good, tmp_path, change, said):
    """It is mended, not refused; what was mended is in the report."""
    folder = broken(good, tmp_path, change, {})
    files = {lang: str(folder / f"{lang}.json") for lang in ("en", "zh")}
    rows, report = parallel_rows(DataParams(source="files", files=files), "zh")
    assert rows["y_tgt"][:] == [row["output"] for row in CHINESE] and rows["y_en"][:] == [row["output"] for row in ENGLISH]
    assert report["tables"]["zh"]["notes"] == ([said] if said else [])


# ---- checkpoints: every weight of a model comes from its file
def damaged(folder: Path, change, **save) -> str:
    """The folder of a tiny model whose weights, file by file, `change` has had its way with."""
    sizes = dict(vocab_size=97, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=save.pop("tied", False))).save_pretrained(folder, **save)
    for file in folder.glob("*.safetensors"):
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return str(folder)


def lacking(name):
    return lambda weights: {key: weight for key, weight in weights.items() if key != name}


UP, HEAD, EMBEDDING = "model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"
WEIGHTS = {
    "a weight missing": (lacking(UP), {}, f"has no weight {UP}"),
    "the head missing": (lacking(HEAD), {}, f"has no weight {HEAD}"),
    "missing from a shard": (lacking(UP), {"max_shard_size": "8KB"}, f"has no weight {UP}"),
    "tied, and no embedding": (lacking(EMBEDDING), {"tied": True}, f"has no weight {HEAD} (and 1 more)"),
    "one too many": (lambda weights: weights | {"model.layers.2.mlp.up_proj.weight": torch.zeros(2)}, {}, "has an unexpected weight model.layers.2.mlp.up_proj.weight"),
    "another shape": (lambda weights: weights | {"model.norm.weight": torch.zeros(8)}, {}, "has the wrong shape in model.norm.weight ([8], not [16])"),
}
WHOLE = {
    "as saved": (dict, {}),
    "in shards": (dict, {"max_shard_size": "8KB"}),
    "tied": (dict, {"tied": True}),
    "tied, the head saved as well": (lambda weights: weights | {HEAD: weights[EMBEDDING].clone()}, {"tied": True}),
    "tied, saved under the head's name": (lambda weights: {HEAD if key == EMBEDDING else key: weight for key, weight in weights.items()}, {"tied": True}),
    "with a buffer of older versions": (lambda weights: weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, {}),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_checkpoint_that_does_not_fit_is_one_line(tmp_path, kind):
    change, how, words = WEIGHTS[kind]
    with pytest.raises(ParamsError) as error:
        load_model(transformers.AutoModelForCausalLM, damaged(tmp_path, change, **how), "models.mine.path")
    told = str(error.value)
    assert "\n" not in told and told.startswith(f"models.mine.path = '{tmp_path}': the checkpoint {words}, as LlamaForCausalLM reads it; "), told


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_checkpoint_is_loaded(tmp_path, kind):
    change, how = WHOLE[kind]
    model = load_model(transformers.AutoModelForCausalLM, damaged(tmp_path, change, **how))
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight) == how.get("tied", False)


def test_a_missing_shard_is_one_line(tmp_path):
    folder = damaged(tmp_path, dict, max_shard_size="8KB")
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(ParamsError, match="not readable as a model: no such file or directory: .*model-00002-of-") as error:
        load_model(transformers.AutoModelForCausalLM, folder)
    assert "\n" not in str(error.value)


def test_a_study_on_a_damaged_base_trains_nothing(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(ROOT / "models" / "micro-llama", base)
    weights = load_file(base / "model.safetensors")
    save_file(lacking("model.layers.3.mlp.up_proj.weight")(weights), base / "model.safetensors", metadata={"format": "pt"})
    (base / "SHA256SUMS").unlink()  # as of a base from elsewhere, which nobody has sealed
    more = {"languages": ["zh"], "methods": ["tft"], "runs": str(tmp_path / "runs"), "data": {"items": 8, "max_length": 256}}
    run = Study(name="s", models={"m": {"path": str(base)}}, train={"max_steps": 1, "batch_size": 2, "per_device_batch_size": 2, "bf16": False}, **more).run("m", "zh", "tft", 0)
    for use in (fine_tune, lambda run: load_generator(run, run.base)):
        with pytest.raises(ParamsError, match=r"models\.m\.path = .*: the checkpoint has no weight model\.layers\.3\.mlp\.up_proj\.weight"):
            use(run)


def test_nobody_loads_a_model_by_himself():
    """All models go through `load_model`; what else is called from_pretrained is a tokenizer or a config, or a cell that shows a model that was just saved."""
    modules = [file for file in (ROOT / "dsft").rglob("*.py") if not file.name.startswith("_")]
    for file in [*modules, *(ROOT / "nbs" / "experiments").glob("*.ipynb")]:
        called = [ast.unparse(node.func) for node in ast.walk(ast.parse(python_code(file))) if isinstance(node, ast.Call)]  # not in words, such as those of a model's card
        assert not [name for name in called if re.search(r"\bAutoModel\w*\.from_pretrained$|\w+For\w+LM\.from_pretrained$", name)], file.name


def test_paths_by_a_variable_of_the_environment(good, tmp_path, capsys, monkeypatch):
    """Data, dictionaries and benchmarks lie where a variable says; what is recorded of the study keeps the variable."""
    monkeypatch.setenv("DSFT_SOMEWHERE", str(tmp_path / "study"))
    items = [{"idx": n, "premise": f"第{n}个人很高兴。", "choice1": "他哭了。", "choice2": "他笑了。", "question": "effect", "label": 1} for n in range(20)]
    folder = broken(good, tmp_path, study("data", files={"en": "${DSFT_SOMEWHERE}/en.json", "zh": "${DSFT_SOMEWHERE}/zh.json"}), {})
    study("recipes.sdrrl", dictionaries={"zh": "${DSFT_SOMEWHERE}/dictionary.txt"})(folder)
    study("evaluation", source="files", data_dir="${DSFT_SOMEWHERE}/benchmarks", benchmarks=["xcopa"])(folder)
    (folder / "benchmarks" / "xcopa").mkdir(parents=True)
    (folder / "benchmarks" / "xcopa" / "test.zh.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in items), encoding="utf-8")
    check_in(folder)
    assert "1 models, languages zh" in capsys.readouterr().out
    run = load_study(folder / "study.yaml").run("micro-llama", "zh", "sdrrl", 0)
    inputs = run.inputs
    assert inputs["data"]["files"]["zh"]["path"] == "${DSFT_SOMEWHERE}/zh.json"
    assert {Path(path).name for path in inputs["files"]} == {"en.json", "zh.json", "dictionary.txt", "translations.jsonl"}
