"""An interrupted training must not go on from its checkpoint when what it is made from has changed meanwhile: the content of the data files, the layers, the rows of
a recipe, the model it starts from, the code, a library. Expected: another checkpoints-<hash> folder each time, and the same one when a file was only touched."""
import json, os, shutil, sys, tempfile
from pathlib import Path
import dsft.files, dsft.study
from dsft.study import Study
folder = Path(tempfile.mkdtemp())
write = lambda name, word: (folder / name).write_text(json.dumps([{"id": n, "instruction": f"{word} {n}?", "input": "", "output": f"{word} {n}."} for n in range(9)], ensure_ascii=False), encoding="utf-8")
write("en.json", "What is"); write("zh.json", "什么是"); (folder / "words.txt").write_text("cat 猫\n")
shutil.copytree("models/micro-llama", folder / "base")
study = Study(name="s", models={"m": {"path": str(folder / "base")}}, languages=["zh"], methods=["tft", "dsft_logits", "sdrrl", {"name": "more", "start": "tft"}], runs=str(folder / "runs"),
              data={"source": "files", "files": {"en": str(folder / "en.json"), "zh": str(folder / "zh.json")}}, recipes={"sdrrl": {"dictionaries": {"zh": str(folder / "words.txt")}}})
runs = {name: study.run("m", "zh", name, 0) for name in study.every_method}
runs["dsft_logits"].layers_file.parent.mkdir(parents=True); runs["dsft_logits"].layers_file.write_text('{"i": 2, "j": 5}')
runs["sdrrl"].training_folder.mkdir(parents=True); runs["sdrrl"].recipe_rows.write_text('{"id": "0"}\n')
shutil.copytree("models/micro-llama", runs["tft"].trained)
names = lambda: {name: run.checkpoints.name for name, run in runs.items()}
versions = dsft.study.versions
def older(): dsft.study.versions = lambda: versions() | {"torch": "2.11.0"}
changes = {
    "touched": (lambda: os.utime(folder / "zh.json", (0, 0)), set()),
    "data": (lambda: write("zh.json", "完全不同的"), {"tft", "dsft_logits", "sdrrl", "more"}),
    "dictionary": (lambda: (folder / "words.txt").write_text("cat 貓\n"), {"sdrrl"}),
    "layers": (lambda: runs["dsft_logits"].layers_file.write_text('{"i": 2, "j": 6}'), {"dsft_logits"}),
    "rows of the recipe": (lambda: runs["sdrrl"].recipe_rows.write_text('{"id": "1"}\n'), {"sdrrl"}),
    "model it starts from": (lambda: (Path(runs["tft"].trained) / "config.json").write_text("{}"), {"more"}),
    "base": (lambda: (folder / "base" / "generation_config.json").write_text("{}"), {"tft", "dsft_logits", "sdrrl"}),
    "library": (older, {"tft", "dsft_logits", "sdrrl", "more"}),
}
faults = 0
for what, (change, expected) in changes.items():
    before = names(); change(); changed = {name for name, key in names().items() if key != before[name]}
    print(f"{what}: other checkpoints for {sorted(changed)} (expected: {sorted(expected)})"); faults += changed != expected
shutil.rmtree(folder)
sys.exit(faults > 0)
