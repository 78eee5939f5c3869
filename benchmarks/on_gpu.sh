#!/usr/bin/env bash
# All that is to be known of the speed on one GPU:   OUT=gpu bash benchmarks/on_gpu.sh PART...
# Parts, each of some minutes on an H200 with 141 GB:
#   train   no step waits (tests); XL/2 at 256 px from plain to compiled; the class slot's price; a trace of the final step
#   sizes   L/2 and B/2; XL/2 at 512 px; growth with the batch; the largest batch; the prediction for more GPUs
#   losses  200 steps of the fast path beside the plain one and float32
#   sample  XL/2 with 250 SDE steps and guidance up to t = 0.85, from the published setting to CUDA graphs; the slot's latency
#   codec   Stable Diffusion's codec (needs diffusers), the evaluator's network and 50,000 images through the evaluator
# Tables and JSON go to the folder OUT. Each command stands for itself: run those that are wanted.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu}
mkdir -p "$OUT"
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
STEP="python benchmarks/train_step.py --precision bf16 --rounds 3 --steps 5"
ALL="--forms plain switches ours compile checkpointing"

train() {
    python -m pytest tests/test_sync.py tests/test_inference.py
    $STEP $ALL --model SiT-XL/2 --batch-size 256 --json "$OUT/xl2.json" | tee "$OUT/xl2.md"
    $STEP --forms compile --model SiT-XL/2 --batch-size 256 --slot-price --json "$OUT/slot.json" | tee "$OUT/slot.md"
    $STEP --forms compile --model SiT-XL/2 --batch-size 256 --profile "$OUT/xl2.trace.json" | tee "$OUT/xl2.profile.txt"
}

sizes() {
    $STEP --forms plain ours compile --model SiT-L/2 SiT-B/2 --batch-size 256 --json "$OUT/l2_b2.json" | tee "$OUT/l2_b2.md"
    $STEP $ALL --model SiT-XL/2 --resolution 512 --batch-size 48 --json "$OUT/xl2_512.json" | tee "$OUT/xl2_512.md"
    $STEP --forms compile --model SiT-XL/2 --batch-size 32 64 128 256 --json "$OUT/growth.json" | tee "$OUT/growth.md"
    $STEP --forms compile --model SiT-XL/2 --batch-size 256 --largest-batch --json "$OUT/largest.json" | tee "$OUT/largest.md"
    python benchmarks/scaling.py --json "$OUT/growth.json" --global-batch 256 | tee "$OUT/scaling.md"
}

losses() {
    for precision in bf16 fp16; do
        python benchmarks/losses.py --model SiT-B/2 --depth 12 --batch-size 64 --resolution 256 --encoder dinov2-vit-b \
            --precision $precision --json "$OUT/losses_$precision.json" --picture "$OUT/losses_$precision.png" |
            tee "$OUT/losses_$precision.md"
    done
}

sample() {
    for dtype in bf16 fp16; do
        python benchmarks/sample.py --device cuda --model SiT-XL/2 --batch-size 64 --dtype $dtype --timed-steps 20 \
            --json "$OUT/sample_$dtype.json" | tee "$OUT/sample_$dtype.md"
    done
}

codec() {
    python benchmarks/encode.py --device cuda --dtype fp16 --json "$OUT/encode.json" | tee "$OUT/encode.md"
    python benchmarks/evaluate.py --device cuda --batch-size auto --images 512 --evaluate 50000 --out "$OUT/evaluate.json" |
        tee "$OUT/evaluate.md"
}

if [ $# = 0 ]; then
    sed -n '2,9p' "$0"
    exit 2
fi
for part in "$@"; do
    case "$part" in
        train | sizes | losses | sample | codec) "$part" ;;
        *)
            echo "on_gpu.sh: no part $part; allowed: train sizes losses sample codec" >&2
            exit 2
            ;;
    esac
done
