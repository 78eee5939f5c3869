#!/usr/bin/env bash
# Measures training, sampling, evaluator and codec on one GPU:   OUT=gpu bash benchmarks/on_gpu.sh PART...
# Parts, each of some minutes on an H200 with 141 GB, the most important first:
#   xl2          tests that no step waits for the GPU; XL/2 at 256 px from plain to compiled; a trace of the compiled step
#   slot         the price of the class slot in training
#   sample       XL/2 with 250 SDE steps and guidance up to t = 0.85, from the published setting to bf16, compiled, CUDA
#                graphs; the price of the class slot in sampling
#   sizes        L/2 and B/2 at 256 px
#   px512        XL/2 at 512 px, also with activation checkpointing
#   codec        the evaluator's network, the evaluator on 50,000 images, Stable Diffusion's codec (needs diffusers)
#   losses       losses of 200 steps of all forms in bf16 and fp16, compared with float32
#   growth       XL/2 with several batch sizes
#   sample_fp16  the part sample in fp16
#   largest      XL/2 with the largest batch that fits into memory
# Tables and JSON are written to the folder OUT. If a program fails, the others still run; the end of the output names it.
set -uo pipefail
cd "$(dirname "$0")/.."
PARTS="xl2 slot sample sizes px512 codec losses growth sample_fp16 largest"
OUT=${OUT:-gpu}
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
STEP="benchmarks/train_step.py --precision bf16 --rounds 3 --steps 5"
failed=""

# measure NAME PROGRAM FLAG...: run a program and copy its output to OUT/NAME.md
measure() {
    local name=$1
    shift
    echo "== $name: python $*"
    python "$@" | tee "$OUT/$name.md" || failed="$failed $name"
}

xl2() {
    measure tests -m pytest tests/test_sync.py tests/test_inference.py
    measure xl2 $STEP --forms plain ours compile --model SiT-XL/2 --batch-size 256 --json "$OUT/xl2.json" \
        --profile "$OUT/xl2.trace.json.gz"
}

slot() {
    measure slot $STEP --forms compile --model SiT-XL/2 --batch-size 256 --slot-price --json "$OUT/slot.json"
}

sample() {
    measure sample_bf16 benchmarks/sample.py --device cuda --model SiT-XL/2 --batch-size 64 --dtype bf16 \
        --timed-steps 20 --json "$OUT/sample_bf16.json"
}

sample_fp16() {
    measure sample_fp16 benchmarks/sample.py --device cuda --model SiT-XL/2 --batch-size 64 --dtype fp16 \
        --timed-steps 20 --pairs 0 --json "$OUT/sample_fp16.json"
}

sizes() {
    measure sizes $STEP --forms plain ours compile --model SiT-L/2 SiT-B/2 --batch-size 256 --json "$OUT/sizes.json"
}

px512() {
    measure px512 $STEP --forms plain ours compile checkpointing --model SiT-XL/2 --resolution 512 --batch-size 48 \
        --json "$OUT/px512.json"
}

codec() {
    measure evaluate benchmarks/evaluate.py --device cuda --batch-size auto --images 512 --evaluate 50000 \
        --json "$OUT/evaluate.json"
    measure encode benchmarks/encode.py --device cuda --dtype fp16 --json "$OUT/encode.json"
}

losses() {
    measure losses benchmarks/train_step.py --losses 200 --batches 8 --model SiT-B/2 --batch-size 32 \
        --precision bf16 fp16 --json "$OUT/losses.json"
}

growth() {
    measure growth $STEP --forms compile --model SiT-XL/2 --batch-size 64 128 256 --json "$OUT/growth.json"
}

largest() {
    measure largest $STEP --forms ours --model SiT-XL/2 --batch-size 256 --largest-batch --json "$OUT/largest.json"
}

if [ $# = 0 ]; then
    sed -n '2,15p' "$0"
    exit 2
fi
for part in "$@"; do
    if [[ " $PARTS " != *" $part "* ]]; then
        echo "on_gpu.sh: no part $part; allowed: $PARTS" >&2
        exit 2
    fi
done
mkdir -p "$OUT"
for part in "$@"; do
    "$part"
done
if [ -n "$failed" ]; then
    echo "on_gpu.sh: failed:$failed" >&2
    exit 1
fi
