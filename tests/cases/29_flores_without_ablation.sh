# A study that asks FLORES but trains no LC or ET alone (as params/gemma2-2b.yaml does) must end with its tables.
# Once: the notebook of table 4 wrote nothing, Snakemake reported missing outputs and stopped before table 1: after days of training a user had no table. A failed analysis
# does not keep the others from being made either, and is told at the end. About three minutes.
export OMP_NUM_THREADS=1; mkdir -p runs; place=$(mktemp -d "$PWD/runs/case 29.XXXX"); trap 'rm -rf "$place"' EXIT
inside="${place#"$PWD"/}"
cat > "$place/flo.yaml" <<Y
models:
  micro-llama: {path: models/micro-llama}
languages: [zh]
methods: [base, tft, dsft_logits]
data: {items: 32, max_length: 256}
train: {epochs: 1, batch_size: 8, per_device_batch_size: 8, bf16: false, logging_steps: 1}
evaluation: {items: 4, benchmarks: [xquad, xcopa, flores]}
runs: $inside
figures: $inside/figures
Y
make_all() { snakemake --profile params/profiles/local --config study="$place/flo.yaml" --cores 2 --quiet rules host > "$place/out" 2>&1; }
make_all || { grep -m1 -E "MissingOutput|Error" "$place/out"; exit 1; }
test -s "$place/figures/flo/table1.md" || exit 1
sed -i 's/"value"/"walue"/' "$place/flo/micro-llama/zh/tft/seed0/samples.jsonl"  # what tables 1 and 2 read, and figure 2 does not
make_all && { echo "a failed analysis was not told"; exit 1; }
test -s "$place/figures/flo/figure2.png" || exit 1
python -W ignore -c "import sys; from dsft.failures import tell; tell(sys.argv[1])" "$place/flo.yaml" 2>&1 | grep -q "analysis/table1.ipynb, cell"
