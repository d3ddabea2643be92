"""data.max_dropped: 1.0 and no usable row. Expected: one line, no example is left. Got: 0 rows are returned, then KeyError: 'y_tgt' in tokenize."""
import json, sys, tempfile
from pathlib import Path
import transformers
from dsft.data import load_parallel, tokenize
from dsft.files import ParamsError
from dsft.settings import DataParams
folder = Path(tempfile.mkdtemp())
(folder / "en.json").write_text(json.dumps([{"id": n, "instruction": f"What is {n}?", "output": ""} for n in range(9)]))
(folder / "zh.json").write_text(json.dumps([{"id": n, "instruction": f"什么是{n}？", "output": "是。"} for n in range(9)]))
try: tokenize(load_parallel(DataParams(source="files", files={k: str(folder / f"{k}.json") for k in ("en", "zh")}, max_dropped=1.0), "zh"), transformers.AutoTokenizer.from_pretrained("models/micro-llama"), 99)
except ParamsError as error: print(error)
except KeyError as error: print("KeyError:", error); sys.exit(1)
