#!/usr/bin/env bash
# Notebooks and dsft/ are in step, and notebooks are clean: nbdev_export and nbdev_clean change no file.
set -euo pipefail
cd "$(dirname "$0")/.."

hashes() { git ls-files --cached --others --exclude-standard -- nbs dsft | while read -r file; do
    [ -e "$file" ] && echo "$(git hash-object --no-filters "$file") $file"; done; }

before=$(hashes)
nbdev_export
nbdev_clean
if ! changed=$(diff <(echo "$before") <(hashes) | sed -n 's/^> [0-9a-f]* //p' | sort -u) || [ -n "$changed" ]; then
    echo "not in step: nbdev_export and nbdev_clean changed these files; commit them as they are now:" >&2
    echo "$changed" >&2
    exit 1
fi
echo "notebooks and dsft/ are in step"
