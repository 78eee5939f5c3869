#!/usr/bin/env bash
# What torchrun runs as each of its processes: bash launch/worker.sh PROGRAM FLAGS. See launch/launch.sh.
set -euo pipefail

# The program has ended with a status that a restart would not change, or it was asked to stop.
if [ -s "$REG_STATUS_FILE" ]; then
    exit 0
fi
# A single process needs no process group. accelerate creates one if LOCAL_RANK is set.
if ((WORLD_SIZE == 1)); then
    unset LOCAL_RANK
fi
exec python "$@"
