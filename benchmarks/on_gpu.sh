#!/usr/bin/env bash
# Measures training, sampling and evaluation on one GPU, in parts of less than ten minutes; the first is part1:
#
#     bash benchmarks/on_gpu.sh part1
#
# benchmarks/on_gpu.py lists the parts. OUT: folder of results.tar.gz. WORK: folder of the results themselves and of
# compiled code, which later calls use again. Both are gpu/ by default. SIZE=tiny runs on a CPU, with tiny networks, to
# try the script. PYTHON: the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/on_gpu.py --out "${OUT:-gpu}" --work "${WORK:-gpu}" --size "${SIZE:-full}" "$@"
