"""Three valid files that are refused with the same wrong reason, "not readable as json: its rows are not alike; mend or fetch the file again":
(a) a folder of the datasets cache that cannot be written; expected: a line that names HF_DATASETS_CACHE. (b) brackets in the path (data[1]/zh.json), which datasets takes for a pattern;
expected: read. (c) JSON Lines above 10 MB whose `input` is null in the first 10 MB and text later; expected: read. 25 s."""
import json, os, subprocess, sys, tempfile
from pathlib import Path
folder = Path(tempfile.mkdtemp()); (folder / "data[1]").mkdir()
row = lambda lang, n, inp: {"id": n, "instruction": f"Question {n}: what is the sum?" + " More of it." * (n % 7) if lang == "en" else f"第{n}个问题：等于几？" + "更多。" * (n % 7), "input": inp, "output": f"That is {n}." + " And so on." * (n % 11) if lang == "en" else f"等于{n}。" + "等等。" * (n % 11)}
for lang in ("en", "zh"):
    (folder / f"{lang}.json").write_text(json.dumps([row(lang, n, "") for n in range(40)], ensure_ascii=False))
    (folder / "data[1]" / f"{lang}.json").write_text((folder / f"{lang}.json").read_text())
    with open(folder / f"{lang}.jsonl", "w") as out:
        for n in range(75_000): out.write(json.dumps(row(lang, n, None if n < 74_000 else "上下文 context"), ensure_ascii=False) + "\n")
print((folder / "en.jsonl").stat().st_size, (folder / "zh.jsonl").stat().st_size)
def read(files, **env):
    code = f"from dsft.data import parallel_rows\nfrom dsft.files import ParamsError\nfrom dsft.settings import DataParams\ntry: print(len(parallel_rows(DataParams(source='files', files={files!r}), 'zh')[0]))\nexcept ParamsError as e: print(e)"
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=os.environ | env).stdout.strip()[-230:]
a = read({k: str(folder / f"{k}.json") for k in ("en", "zh")}, HF_DATASETS_CACHE="/proc/nowhere")
b = read({k: str(folder / "data[1]" / f"{k}.json") for k in ("en", "zh")})
c = read({k: str(folder / f"{k}.jsonl") for k in ("en", "zh")})
print("(a)", a, "\n(b)", b, "\n(c)", c); sys.exit(any("not alike" in told for told in (a, b, c)))
