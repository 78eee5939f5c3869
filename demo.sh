#!/usr/bin/env bash
# Runs REG on two CPU cores in minutes; only Python packages are downloaded. The script sets up the environment,
# prepares real handwritten digits, trains an encoder and REG on one half of them, generates images, and evaluates them
# against the other half. Results: demo/samples.png, demo/loss.png and demo/score.json.
set -euo pipefail
cd "$(dirname "$0")"
source launch/environment.sh

OUT=demo
rm -rf "$OUT/raw" "$OUT/data" "$OUT/exps" "$OUT/samples" # from an earlier demo
START=$SECONDS

echo "1. images of digits, one folder per class"
python experiments/digits.py images --dest "$OUT/raw"

echo "2. preprocessing: crops of 16 px, then latents (here the pixels themselves)"
python preprocessing/convert.py --source "$OUT/raw" --dest "$OUT/data/images" --resolution 16
python preprocessing/encode.py --source "$OUT/data/images" --dest "$OUT/data/vae-sd" --vae pixel --batch-size 128

echo "3. a small vision transformer is trained to classify digits; it is used in place of DINOv2"
python experiments/digits.py encoder --dest "$OUT/encoder.safetensors"

echo "4. REG: a small SiT is trained to denoise digits together with the encoder's class token"
python train.py \
    --output-dir "$OUT/exps" \
    --exp-name digits \
    --data-dir "$OUT/data" \
    --enc-type "$(python experiments/digits.py encoder-spec)" \
    --enc-weights "$OUT/encoder.safetensors" \
    --model SiT-S/4 --depth 6 --hidden-size 192 --num-heads 3 --encoder-depth 3 --projector-dim 256 \
    --batch-size 64 \
    --learning-rate 1e-3 \
    --ema-decay 0.98 \
    --max-train-steps 900 \
    --log-steps 10 \
    --sampling-steps 450 \
    --checkpointing-steps 450 \
    --num-workers 1

echo "5. generation of images and class tokens from noise, without the encoder"
python generate.py \
    --ckpt "$OUT/exps/digits/checkpoints/0000900.pt" \
    --sample-dir "$OUT/samples" \
    --name digits \
    --num-fid-samples 900 \
    --label-sampling balanced \
    --num-steps 50 \
    --per-proc-batch-size 300 \
    --save-cls

echo "6. evaluation with a classifier and 899 digits that were not used in training"
python experiments/digits.py score \
    --samples "$OUT/samples/digits" \
    --encoder "$OUT/encoder.safetensors" \
    --dest "$OUT/score.json"

cp "$OUT/samples/digits/grid.png" "$OUT/samples.png"
cp "$OUT/exps/digits/loss.png" "$OUT/loss.png"
echo "demo: $((SECONDS - START)) seconds; results: $OUT/samples.png, $OUT/loss.png and $OUT/score.json"
