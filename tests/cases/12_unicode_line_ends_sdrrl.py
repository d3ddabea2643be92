"""Only a newline ends a line of sdrrl.sentences / translations / dictionaries; U+2028, U+0085, form feed ... are text (as dsft.files.read_rows has it).
Expected: 3 pairs, ("Second...", "第二句") among them; the translation is read. Got: str.splitlines: 4 misaligned pairs without a word, and a valid JSON line refused."""
import json, sys, tempfile
from pathlib import Path
from dsft.files import ParamsError
from dsft.recipes.sdrrl import _aligned_sentences, _read_translations
folder = Path(tempfile.mkdtemp())
(folder / "en").write_text("First sentence.\nSecond\u2028sentence.\nThird.\n", encoding="utf-8")
(folder / "zh").write_text("第一\u2028句。\n第二句。\n第三句。\n", encoding="utf-8")
(folder / "t.jsonl").write_text(json.dumps({"en": "Yes.", "translation": "是。\u2028好。"}, ensure_ascii=False) + "\n", encoding="utf-8")
pairs = _aligned_sentences((str(folder / "en"), str(folder / "zh")), "zh")
try:
    known = _read_translations(str(folder / "t.jsonl"), "zh")
except ParamsError as error:
    known = f"refused: {error}"
print(pairs, known)
sys.exit(len(pairs) != 3 or not isinstance(known, dict))
