#!/usr/bin/env bash
# All that is to be known of training's speed on one GPU, into the folder given (default: gpu): the tests that no step
# waits; XL/2, L/2 and B/2 at 256 px and XL/2 at 512 px, plain to compiled; the class slot's price; growth with the
# batch; a trace of the final step; losses of the fast path beside the plain one's; the prediction for more GPUs.
# About half an hour on an H200 with 141 GB. Each command stands for itself: run those that are wanted.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT="${1:-gpu}"
mkdir -p "$OUT"
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
STEP="python benchmarks/train_step.py --precision bf16 --rounds 3 --steps 5"
ALL="--forms plain switches ours compile checkpointing"

python -m pytest tests/test_sync.py
$STEP $ALL --model SiT-XL/2 --batch-size 256 --json "$OUT/xl2.json" | tee "$OUT/xl2.md"
$STEP --forms compile --model SiT-XL/2 --batch-size 256 --profile "$OUT/xl2.trace.json" | tee "$OUT/xl2.profile.txt"
$STEP --forms plain ours compile --model SiT-L/2 SiT-B/2 --batch-size 256 --json "$OUT/l2_b2.json" | tee "$OUT/l2_b2.md"
$STEP $ALL --model SiT-XL/2 --resolution 512 --batch-size 48 --json "$OUT/xl2_512.json" | tee "$OUT/xl2_512.md"
$STEP --forms compile --model SiT-XL/2 --batch-size 256 --slot-price --json "$OUT/slot.json" | tee "$OUT/slot.md"
$STEP --forms compile --model SiT-XL/2 --batch-size 32 64 128 256 --json "$OUT/growth.json" | tee "$OUT/growth.md"
$STEP --forms compile --model SiT-XL/2 --batch-size 256 --largest-batch --json "$OUT/largest.json" | tee "$OUT/largest.md"
for precision in bf16 fp16; do
    python benchmarks/losses.py --model SiT-B/2 --depth 12 --batch-size 64 --resolution 256 --encoder dinov2-vit-b \
        --precision $precision --json "$OUT/losses_$precision.json" --picture "$OUT/losses_$precision.png" |
        tee "$OUT/losses_$precision.md"
done
python benchmarks/scaling.py --json "$OUT/growth.json" --global-batch 256 | tee "$OUT/scaling.md"
