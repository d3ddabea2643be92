# Names and folders with spaces, quotes, signs of regular expressions and of shells, other letters: the jobs run, or dsft_check refuses the study in one line.
# Once: "my model" and runs: "my runs" -> papermill: unexpected extra argument(s); "c++" -> MissingInputException (the name was read as a pattern). Nothing in a name is ever run.
export OMP_NUM_THREADS=1; bad=0; mkdir -p runs; place=$(mktemp -d "$PWD/runs/case 24 é.XXXX"); trap 'rm -rf "$place" named.here' EXIT
say() { echo "$1"; bad=1; }
study() { # file, model, runs
    printf 'models:\n  %s: {path: models/micro-llama}\nlanguages: [zh]\nmethods: [base]\nlayers: {i: 2, j: 5}\nruns: %s\nfigures: %s\nevaluation: {items: 4, benchmarks: [xcopa]}\n' "$2" "$3" "$3" > "$1"; }
runs() { study "$@"; python -W ignore -c "import sys; from dsft.checks import check; check(sys.argv[1])" "$1" > /dev/null || say "refused: $*"
    snakemake --config study="$1" --nolock --cores 1 --quiet host --until select_layers > "$place/out" 2>&1 || say "$* -> $(grep -m1 -E "unexpected extra|Missing|Error|rror:" "$place/out")"
    [ -e named.here ] && say "a name was run: $*"; }
refused() { study "$@"; told=$(python -W ignore -c "import sys; from dsft.checks import check; check(sys.argv[1])" "$1" 2>&1 > /dev/null) && say "not refused: $*"
    [ "$(printf '%s\n' "$told" | wc -l)" = 1 ] || say "more than a line: $told"; }
inside="${place#"$PWD"/}"
runs "$place/named.yaml" '"my model"' "'$inside'"
runs "$place/signs.yaml" '"c++ (a|b)* [x] ^$ ?"' "'$inside'"
runs "$place/shell.yaml" "'a; touch named.here \$(touch named.here) \`touch named.here\` & \"b\" ''c'''" "'$inside'"
runs "$place/letters and näme.yaml" '"模型 é"' "'$inside/my runs; touch named.here'"
refused "$place/braces.yaml" '"{model}"' "'$inside'"
refused "$place/path.yaml" '"org/name"' "'$inside'"
refused "$place/runs.yaml" 'm' "'$inside/{runs}'"
exit $bad
