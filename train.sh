#!/usr/bin/env bash
# Trains on ImageNet with a published recipe. Settings are environment variables; further flags go to train.py:
#
#     MODEL=SiT-XL/2 DATA_DIR=/data/imagenet256 bash train.sh --seed 1
#     RECIPE=srdit bash train.sh
#
# A recipe is a file of settings, recipes/train/RECIPE.json. The variables and flags that are given replace its values.
#
# The same command resumes an interrupted run. It uses all GPUs of the machine. For several machines, run it on each
# machine with NUM_MACHINES, MACHINE_RANK, HEAD_ADDRESS and HEAD_PORT (launch/launch.sh), or submit it to SLURM:
#
#     sbatch --nodes 4 --ntasks-per-node 1 --gpus-per-node 8 --requeue --open-mode append --signal USR1@300 --wrap "srun --kill-on-bad-exit=1 bash train.sh"
#     sbatch --gpus 8 --requeue --open-mode append --signal B:USR1@300 train.sh (one machine)
#
# With --resume-step N, the run goes back to its checkpoint of step N: what is later is moved to set-aside/ in its folder.
# If torchrun or SLURM restarts the same command (TORCHELASTIC_RESTART_COUNT, SLURM_RESTART_COUNT) after it has gone
# back, the run continues from its newest checkpoint and does not go back again.
#
# Relative paths that are given mean the folder of the caller; the defaults are in the folder of this script.
#
# A run that lost a process restarts by itself, at most MAX_RESTARTS times. After SIGTERM, SIGUSR1, SIGHUP or Ctrl-C,
# the run saves a checkpoint and ends with exit status 75, "can be resumed". A SLURM job is then put back into the
# queue, except after Ctrl-C.
set -euo pipefail
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ ! -e "$REPOSITORY/launch/launch.sh" ]; then # sbatch runs a copy of this script
    original=$(scontrol show job "${SLURM_JOB_ID:-}" 2> /dev/null | sed -n 's/^ *Command=\([^ ]*\).*/\1/p') || true
    for REPOSITORY in "$(dirname "$original")" "${SLURM_SUBMIT_DIR:-}" ""; do
        [ ! -e "$REPOSITORY/launch/launch.sh" ] || break
    done
fi
if [ -z "$REPOSITORY" ]; then
    echo "train.sh: error: its folder, which has launch/launch.sh, is not found; call sbatch in that folder, or submit the" \
        'job with --wrap "srun bash /FOLDER/train.sh"' >&2
    exit 2
fi
source "$REPOSITORY/launch/launch.sh"
source "$REPOSITORY/launch/recipe.sh"

choose_recipe train "$@"                  # RECIPE: reg (default), repa, sit, srdit or srdit-muon; recipes/README.md
MODEL=${MODEL:-$(recipe_setting model)}   # SiT-{S,B,L,XL}/{1,2,4,8}
DATA_DIR=${DATA_DIR:-$REPOSITORY/data/imagenet256} # images and latents: preprocessing/README.md
OUTPUT_DIR=${OUTPUT_DIR:-$REPOSITORY/exps} # folder of all runs
EXP_NAME=${EXP_NAME:-$RECIPE-${MODEL//\//-}} # folder of this run in OUTPUT_DIR
ENCODER=${ENCODER:-$(recipe_setting enc_type)} # names: README.md
BATCH_SIZE=${BATCH_SIZE:-$(recipe_setting batch_size)} # in total, over all GPUs of all machines
STEPS=${STEPS:-$(recipe_setting max_train_steps)} # 400 K in most tables, 4 M for the best result
PRECISION=${PRECISION:-}                  # fp16, bf16 or no; empty: the recipe's, else fp16 on GPUs, no on the CPU
REPORT_TO=${REPORT_TO:-none}              # wandb, tensorboard or none

status=0
launch "$REPOSITORY/train.py" \
    --model "$MODEL" \
    --data-dir "$DATA_DIR" \
    --output-dir "$OUTPUT_DIR" \
    --exp-name "$EXP_NAME" \
    --enc-type "$ENCODER" \
    --batch-size "$BATCH_SIZE" \
    --max-train-steps "$STEPS" \
    --report-to "$REPORT_TO" \
    ${PRECISION:+--mixed-precision "$PRECISION"} \
    --resume latest \
    --config "$RECIPE_FILE" \
    "$@" || status=$?

if ((status == EXIT_RESUMABLE && !INTERRUPTED)) && [ -n "${SLURM_JOB_ID:-}" ]; then
    # The head machine requeues the job. The other machines end with 0: otherwise srun --kill-on-bad-exit=1 could kill
    # the task of the head machine first.
    ((MACHINE_RANK == 0)) || exit 0
    if ! command -v scontrol > /dev/null; then
        echo "train.sh: scontrol is not in PATH, so job $SLURM_JOB_ID is not requeued; submit it again to resume" >&2
    elif scontrol requeue "$SLURM_JOB_ID"; then
        echo "train.sh: job $SLURM_JOB_ID is back in the queue, restart $((${SLURM_RESTART_COUNT:-0} + 1))"
    else
        echo "train.sh: job $SLURM_JOB_ID cannot be requeued; submit it again to resume" >&2
    fi
fi
exit "$status"
