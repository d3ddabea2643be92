#!/usr/bin/env bash
# Runs every case of this folder: what once went wrong, one a file, with the right result in its head. Exit code: how many went wrong again.
cd "$(dirname "$0")/../.." || exit 1
faults=0
for case in tests/cases/[0-9]*; do
    case $case in
        *.py) PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH} python -W ignore "$case" ;;
        *.sh) PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} bash "$case" ;;
    esac > "${TMPDIR:-/tmp}/case.$$" 2>&1 < /dev/null
    if rc=$?; [ $rc = 0 ]; then echo "ok     $(basename "$case")"; else
        faults=$((faults + 1))
        echo "FAULT  $(basename "$case") (exit code $rc): $(grep . "${TMPDIR:-/tmp}/case.$$" | tail -n 1)"
    fi
done
rm -f "${TMPDIR:-/tmp}/case.$$"
exit $faults
