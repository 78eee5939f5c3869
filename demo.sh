#!/usr/bin/env bash
# Runs REG on two CPU cores in minutes; only Python packages are downloaded. The script sets up the environment, renders
# pictures of ten solids, trains an encoder and REG on them, generates pictures, and compares these with other rendered
# pictures. Results: demo/samples.png, demo/loss.png and demo/score.json.
set -euo pipefail
cd "$(dirname "$0")"
source launch/environment.sh

OUT=demo
rm -rf "$OUT/raw" "$OUT/data" "$OUT/held_out" "$OUT/exps" "$OUT/samples" # from an earlier demo
START=$SECONDS

echo "1. 4,000 rendered pictures, one folder per class: 3,000 for training, 1,000 for evaluation"
python experiments/demo.py images --dest "$OUT/raw"

echo "2. preprocessing: crops of 24 px, then latents (here the pixels themselves)"
python preprocessing/convert.py --source "$OUT/raw/train" --dest "$OUT/data/images" --resolution 24
python preprocessing/convert.py --source "$OUT/raw/held_out" --dest "$OUT/held_out/images" --resolution 24
python preprocessing/encode.py --source "$OUT/data/images" --dest "$OUT/data/vae-sd" --vae pixel --batch-size 128

echo "3. a small network is trained to classify the pictures; it is used in place of DINOv2"
python experiments/demo.py encoder --images "$OUT/data/images" --dest "$OUT/encoder.safetensors"

echo "4. REG: a small SiT is trained to denoise pictures together with the encoder's class token"
python train.py \
    --output-dir "$OUT/exps" \
    --exp-name solids \
    --data-dir "$OUT/data" \
    --enc-type "$(python experiments/demo.py encoder-spec)" \
    --enc-weights "$OUT/encoder.safetensors" \
    --model SiT-S/4 --depth 4 --hidden-size 192 --num-heads 3 --encoder-depth 2 --projector-dim 256 \
    --batch-size 16 \
    --learning-rate 3e-3 \
    --ema-decay 0.995 \
    --max-train-steps 2000 \
    --log-steps 25 \
    --sampling-steps 500 \
    --grid-samples 40 \
    --checkpointing-steps 1000 \
    --num-workers 1

echo "5. generation of pictures and class tokens from noise, without the encoder"
python generate.py \
    --ckpt "$OUT/exps/solids/checkpoints/0002000.pt" \
    --sample-dir "$OUT/samples" \
    --name solids \
    --num-fid-samples 400 \
    --label-sampling balanced \
    --num-steps 40 \
    --cfg-scale 1.5 \
    --per-proc-batch-size 200 \
    --save-cls

echo "6. evaluation with a classifier that is trained on the 1,000 held-out pictures"
python experiments/demo.py score \
    --samples "$OUT/samples/solids" \
    --encoder "$OUT/encoder.safetensors" \
    --images "$OUT/data/images" \
    --held-out "$OUT/held_out/images" \
    --dest "$OUT/score.json"

cp "$OUT/samples/solids/grid.png" "$OUT/samples.png"
cp "$OUT/exps/solids/loss.png" "$OUT/loss.png"
echo "demo: $((SECONDS - START)) seconds. What to look at:"
echo "  $OUT/samples.png                generated pictures, one column for each class"
echo "  $OUT/exps/solids/samples/       the same noise and classes during training; real ones: reconstructions.png"
echo "  $OUT/loss.png                   the loss terms over training"
echo "  $OUT/score.json                 the scores printed above"
