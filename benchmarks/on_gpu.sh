#!/usr/bin/env bash
# Measures training, sampling and evaluation on one GPU, in parts of less than ten minutes; the first is part1:
#
#     bash benchmarks/on_gpu.sh part1
#
# benchmarks/README.md lists the parts. OUT: folder of results.tar.gz. WORK: folder of the results themselves and of
# compiled code, which later calls use again. Both are gpu/ in the repository by default. SIZE=tiny runs tiny networks
# on a CPU, to try the script. PYTHON: the interpreter.
set -euo pipefail
REPOSITORY=$(cd "$(dirname "$0")/.." && pwd)
exec "${PYTHON:-python3}" "$REPOSITORY/benchmarks/on_gpu.py" --out "${OUT:-$REPOSITORY/gpu}" \
    --work "${WORK:-$REPOSITORY/gpu}" --size "${SIZE:-full}" "$@"
