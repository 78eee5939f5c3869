#!/usr/bin/env bash
# Generates 50,000 images from a checkpoint and evaluates them with the metrics of ADM. Settings are environment
# variables; further flags go to generate.py. Examples without guidance and with the guidance of the best result:
#
#     CKPT=exps/reg-SiT-B-2/checkpoints/0400000.pt REF_BATCH=VIRTUAL_imagenet256_labeled.npz bash eval.sh
#     CFG_SCALE=2.3 GUIDANCE_HIGH=0.85 CKPT=... REF_BATCH=... bash eval.sh
#
# RECIPE=srdit samples as for the published number of a network that RECIPE=srdit of train.sh trained. A recipe is a file
# of settings, recipes/generate/RECIPE.json. The variables and flags that are given replace its values.
#
# CKPT is a checkpoint, a run's folder for its newest checkpoint, an exported network, or a name of the hub. The same
# command resumes an interrupted evaluation. The result is written next to the images, as result.json. Relative paths
# that are given mean the folder of the caller; the default is in the folder of this script.
set -euo pipefail
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ ! -e "$REPOSITORY/launch/launch.sh" ]; then # sbatch runs a copy of this script
    original=$(scontrol show job "${SLURM_JOB_ID:-}" 2> /dev/null | sed -n 's/^ *Command=\([^ ]*\).*/\1/p') || true
    for REPOSITORY in "$(dirname "$original")" "${SLURM_SUBMIT_DIR:-}" ""; do
        [ ! -e "$REPOSITORY/launch/launch.sh" ] || break
    done
fi
if [ -z "$REPOSITORY" ]; then
    echo "eval.sh: error: its folder, which has launch/launch.sh, is not found; call sbatch in that folder, or submit the" \
        'job with --wrap "srun bash /FOLDER/eval.sh"' >&2
    exit 2
fi
source "$REPOSITORY/launch/launch.sh"
source "$REPOSITORY/launch/recipe.sh"

choose_recipe generate "$@"                  # RECIPE: reg (default), repa, sit, srdit or srdit-muon; recipes/README.md
CKPT=${CKPT:?must name the checkpoint to evaluate}
REF_BATCH=${REF_BATCH:?must name the reference .npz, VIRTUAL_imagenet256_labeled.npz for ImageNet at 256 px}
SAMPLE_DIR=${SAMPLE_DIR:-$REPOSITORY/samples} # folder of all sample sets
NUM_SAMPLES=${NUM_SAMPLES:-50000}            # images
LABELS=${LABELS:-$(recipe_setting label_sampling)} # random; balanced: equally many of each class; none
NUM_STEPS=${NUM_STEPS:-$(recipe_setting num_steps)} # SDE steps
CFG_SCALE=${CFG_SCALE:-1.0}                  # guidance scale of the image; 1.0: no guidance
CLS_CFG_SCALE=${CLS_CFG_SCALE:-$CFG_SCALE}   # guidance scale of the class token
GUIDANCE_HIGH=${GUIDANCE_HIGH:-1.0}          # guidance is used up to this time; 0.85 for the best result
BATCH_SIZE=${BATCH_SIZE:-64}                 # images per batch on each GPU; auto: the largest that fits
INCEPTION=${INCEPTION:-}                     # file of the Inception weights; empty: they are downloaded once

# These files are read only after all images have been generated, so check them now.
for file in "$REF_BATCH" ${INCEPTION:+"$INCEPTION"}; do
    [ -e "$file" ] || fail "$file: no such file"
done

# A folder of checkpoints stands for the newest; a name of the hub has no folders here.
newest=$(find "$CKPT" "$CKPT/checkpoints" -maxdepth 1 -name '[0-9]*.pt' 2> /dev/null | sort -V | tail -n 1) || true
CKPT=${newest:-$CKPT}
RUN=$(dirname "$CKPT")
if [ -e "$CKPT" ]; then RUN=$(basename "$(dirname "$(dirname "$(realpath "$CKPT")")")"); fi
NAME=${NAME:-${RUN//\//-}-$(basename "$CKPT" .pt)-$NUM_STEPS-cfg-$CFG_SCALE-$CLS_CFG_SCALE-to-$GUIDANCE_HIGH-$LABELS}

launch "$REPOSITORY/generate.py" \
    --ckpt "$CKPT" \
    --sample-dir "$SAMPLE_DIR" \
    --name "$NAME" \
    --num-fid-samples "$NUM_SAMPLES" \
    --label-sampling "$LABELS" \
    --mode sde \
    --num-steps "$NUM_STEPS" \
    --cfg-scale "$CFG_SCALE" \
    --cls-cfg-scale "$CLS_CFG_SCALE" \
    --guidance-high "$GUIDANCE_HIGH" \
    --per-proc-batch-size "$BATCH_SIZE" \
    --config "$RECIPE_FILE" \
    "$@"

launch "$REPOSITORY/evaluations/evaluator.py" \
    --ref_batch "$REF_BATCH" \
    --sample_batch "$SAMPLE_DIR/$NAME/samples.npz" \
    --save_path "$SAMPLE_DIR/$NAME/result.json" \
    --num_steps "$NUM_STEPS" \
    --cfg "$CFG_SCALE" \
    --cls_cfg "$CLS_CFG_SCALE" \
    --gh "$GUIDANCE_HIGH" \
    ${INCEPTION:+--inception "$INCEPTION"}
