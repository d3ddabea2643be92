"""ids that pandas made floats because one was missing (parquet: 0.0, 1.0, None, ...) are the same ids as 0, 1 in the English JSON.
Expected: 39 pairs, one row dropped as "id is missing". Got: 80 of 80 rows unusable, "no partner" (the ids are compared as "1.0" and "1")."""
import json, sys, tempfile
from pathlib import Path
from datasets import Dataset
from dsft.data import parallel_rows
from dsft.files import ParamsError
from dsft.settings import DataParams
folder = Path(tempfile.mkdtemp())
(folder / "en.json").write_text(json.dumps([{"id": n, "instruction": "What is in the box of the man?" + " And what is in the bag?" * n, "output": "It is a book."} for n in range(40)]))
Dataset.from_list([{"id": None if n == 5 else float(n), "instruction": "这是什么？" + "多说。" * n, "output": "是这样。"} for n in range(40)]).to_parquet(folder / "zh.parquet")
try: print(len(parallel_rows(DataParams(source="files", files={"en": str(folder / "en.json"), "zh": str(folder / "zh.parquet")}), "zh")[0]), "pairs")
except ParamsError as error: print(error); sys.exit(1)
