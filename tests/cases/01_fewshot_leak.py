"""Few-shot prompts must not contain the asked item with its own gold answer.
Expected: 0 of 40. (lm-eval leaves the asked item out only where fewshot_split is named.)"""
import sys, tempfile
import torch, transformers
import dsft.tasks as T
from dsft.study import Study
transformers.logging.set_verbosity_error()
path, seen = "models/micro-llama", {}
run = T.simple_evaluate
def spy(**k):
    result = run(**k); seen.update(result["samples"]); return result
T.simple_evaluate = spy
tok = transformers.AutoTokenizer.from_pretrained(path)
model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
study = Study(name="leak", models={"m": {"path": path}}, languages=["zh"], methods=["tft"], runs=tempfile.mkdtemp(),
              evaluation={"benchmarks": ["xcopa"], "items": 40, "num_fewshot": 5, "batch_size": 8})
T.evaluate(model, tok, study, ["zh"])
own = sum(s["doc"]["prompt"] + s["doc"]["choices"][s["doc"]["label"]] in s["arguments"][0][0] for s in seen["xcopa_zh"])
print(f"prompts that hold their own gold answer: {own} of {len(seen['xcopa_zh'])} (expected 0)")
sys.exit(own > 0)
