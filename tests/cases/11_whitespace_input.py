"""An input of white space only is no input: the Alpaca template without "### Input:" is right.
Expected: no "### Input:" in x_tgt. Got: an empty Input section, and the parallel English row (input "") gets the other template."""
import json, sys, tempfile
from pathlib import Path
from dsft.data import load_parallel
from dsft.settings import DataParams
folder = Path(tempfile.mkdtemp())
for lang, ask, blank in (("en", "What is {0} and {0}?", ""), ("zh", "{0}加{0}等于几?", " \n")):
    (folder / f"{lang}.json").write_text(json.dumps([{"id": n, "instruction": ask.format(n), "input": blank, "output": "等于" + str(n) if lang == "zh" else f"It is {n}"} for n in range(9)]))
row = load_parallel(DataParams(source="files", files={k: str(folder / f"{k}.json") for k in ("en", "zh")}, template="alpaca"), "zh")[0]
print(repr(row["x_tgt"][-60:]), "| en:", repr(row["x_en"][-40:]))
sys.exit("### Input:" in row["x_tgt"])
