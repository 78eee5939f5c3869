#!/usr/bin/env bash
# Sets up the environment and runs the linter and all tests. Arguments go to pytest:
#
#     bash test.sh tests/test_sit.py -k counts
#
# Tests that need real photographs read them from the folder REG_ASSETS; they are skipped if it is not set.
# Tests that need a GPU are skipped without one; `bash test.sh -m gpu` runs only them. With REG_TEST_DEVICE=cuda most
# other tests run the programs on the GPU as well. The tests run in two processes; `bash test.sh --numprocesses 0` runs
# them in one.
set -euo pipefail
cd "$(dirname "$0")"
source launch/environment.sh

ruff check .
ruff format --check .
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python -m pytest --numprocesses 2 --dist worksteal "$@"
