"""dsft.files.from_hub promises one line for an "incomplete" model. A folder whose safetensors lacks one matrix is incomplete.
Expected: ParamsError naming model.layers.3.mlp.up_proj.weight. Got: loaded, that matrix random (transformers' warning only), and the study goes on."""
import shutil, sys, tempfile
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file, save_file
from dsft.files import ParamsError
from dsft.study import Study
from dsft.training import fine_tune
folder = Path(tempfile.mkdtemp()); shutil.copytree("models/micro-llama", folder / "m")
weights = load_file(folder / "m" / "model.safetensors"); del weights["model.layers.3.mlp.up_proj.weight"]
save_file(weights, folder / "m" / "model.safetensors", metadata={"format": "pt"})
study = Study(name="s", models={"m": {"path": str(folder / "m")}}, languages=["zh"], methods=["tft"], runs=str(folder / "runs"), data={"items": 8, "max_length": 256},
              train={"max_steps": 1, "batch_size": 2, "per_device_batch_size": 2, "bf16": False})
try: fine_tune(study.run("m", "zh", "tft", 0))
except ParamsError as error: print("refused:", error); sys.exit(0)
print("trained on a model with a random matrix"); sys.exit(1)
