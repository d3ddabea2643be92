"""XQuAD exists in el, ro, ru, th, tr; with prompt: [harness] dsft_check accepts them. Their F1 has no rules in the MLQA scorer.
Expected: refused by check_benchmarks in one line (or scored by words, as XQuAD's own script does). Got: the check passes, everything is generated, then ValueError."""
import json, sys, tempfile
from pathlib import Path
import torch, transformers
from dsft.benchmark_items import check_benchmarks
from dsft.files import ParamsError
from dsft.study import Study
from dsft.tasks import evaluate
transformers.logging.set_verbosity_error()
folder = Path(tempfile.mkdtemp()); (folder / "xquad").mkdir()
for lang, context, question in (("ru", "Столица России - Москва. Это большой город.", "Какой город столица России?"), ("en", "The capital of Russia is Moscow. It is a big city.", "What is the capital of Russia?")):
    qas = [{"id": "1", "question": question, "answers": [{"text": "Москва" if lang == "ru" else "Moscow", "answer_start": 0}]}]
    (folder / "xquad" / f"xquad.{lang}.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": qas}]}]}))
path = "models/micro-llama"
study = Study(name="x", models={"m": {"path": path}}, languages=["ru"], methods=["tft"], runs=str(folder / "runs"), data={"source": "files", "files": {"en": "a.json", "ru": "b.json"}},
              evaluation={"source": "files", "data_dir": str(folder), "benchmarks": ["xquad"], "prompt": ["harness"], "max_new_tokens": 4})
try:
    check_benchmarks(study.evaluation, ("ru", "en")); print("check passed")
    evaluate(transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), transformers.AutoTokenizer.from_pretrained(path), study, ["ru"])
except ParamsError as error: print("one line:", error)
except ValueError as error: print("ValueError after generation:", error); sys.exit(1)
