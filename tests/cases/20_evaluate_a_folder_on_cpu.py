"""dsft.tasks.evaluate takes "the name of a folder"; without a GPU evaluation.device "default: the GPU if there is one".
Expected: evaluated on the CPU. Got: AssertionError: Torch not compiled with CUDA enabled (a CPU build of torch; device None goes to lm-eval as it is)."""
import sys, tempfile
import transformers
from dsft.study import Study
from dsft.tasks import evaluate
path = "models/micro-llama"
study = Study(name="x", models={"m": {"path": path}}, languages=["zh"], methods=["tft"], runs=tempfile.mkdtemp(), evaluation={"benchmarks": ["xcopa"], "items": 2, "batch_size": 2})
try: print(evaluate(path, transformers.AutoTokenizer.from_pretrained(path), study, ["zh"])[0][0]["metric"])
except AssertionError as error: print("AssertionError:", error); sys.exit(1)
