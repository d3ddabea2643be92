# Editing an instruction file after a study has run must retrain what was trained on it. Run from the root of the project; about half a minute.
# Expected: the second, dry run plans `train` again; a file that was only touched is not trained on again.
set -e
export PYTHONPATH=$PWD OMP_NUM_THREADS=1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python - "$folder" <<'P'
import json, sys
from pathlib import Path
rows = {"en": ("What is {0} and {0}?", "That is {1}."), "zh": ("{0}加{0}等于几?", "等于{1}。")}
for lang, (asked, said) in rows.items():
    items = [{"id": n, "instruction": asked.format(n), "input": "", "output": said.format(n, 2 * n)} for n in range(16)]
    Path(sys.argv[1], f"{lang}.json").write_text(json.dumps(items), encoding="utf-8")
P
cat > "$folder/edited.yaml" <<Y
models:
  micro-llama: {path: models/micro-llama}
languages: [zh]
methods: [tft]
layers: {i: 2, j: 5}
data: {source: files, files: {en: $folder/en.json, zh: $folder/zh.json}, max_length: 256}
train: {epochs: 1, batch_size: 8, per_device_batch_size: 8, learning_rate: 1.0e-3, bf16: false, logging_steps: 1}
evaluation: {items: 4, benchmarks: [xcopa]}
runs: $folder/runs
figures: $folder/figures
Y
target=$(python -c 'import os, sys; print(os.path.relpath(sys.argv[1]))' "$folder/runs/edited/micro-llama/zh/tft/seed0/train_log.jsonl")
plan() { snakemake "$target" --config study="$folder/edited.yaml" --nolock --rerun-incomplete --cores 1 --quiet host "$@" 2>&1; }
plan >/dev/null || { echo "the training failed"; exit 2; }
sleep 1
touch "$folder/zh.json"
plan --dry-run | grep -q "Nothing to be done" || { echo "FAULT: touched data, trained again"; exit 1; }
sed -i 's/\("output": "\)/\1NEW /g' "$folder/zh.json"
touch -d "2000-01-01" "$folder/zh.json" # even if it looks older than what was made of it
if plan --dry-run | grep -q "Nothing to be done"; then echo "FAULT: edited data, nothing retrained"; exit 1; fi
echo "mended"
