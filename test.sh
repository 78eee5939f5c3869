#!/usr/bin/env bash
# Makes the environment and runs every test and the linter. Arguments go to pytest: bash test.sh tests/test_sit.py -k counts
# Tests that want real photographs read the folder named by REG_ASSETS and are skipped without it.
set -euo pipefail
cd "$(dirname "$0")"
source launch/environment.sh

ruff check .
ruff format --check .
python -m pytest "$@"
