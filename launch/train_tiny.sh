#!/usr/bin/env bash
# From drawings to pictures on a laptop CPU with the tiny random family: the cache, every trainable list, one comparison.
#   launch/train_tiny.sh [STEPS [LIST ...]]     needs ../shared/data/emoji_styles and an active .venv; from the root
set -euo pipefail
steps=${1:-200}
lists=("${@:2}")
[[ ${#lists[@]} -gt 0 ]] || lists=(projector splice_lora siglip siglip_lora lora)
runs=("${lists[@]/#/runs/tiny/}")

python -m miniature.family --out out/family
python -m data_tools.build --config configs/data/emoji_styles.yaml --out out/emoji --pair.max-triplets-per-split 256

rm -rf runs/tiny  # training refuses a folder that already holds a run
for list in "${lists[@]}"; do
  ztrain cache --config "configs/$list.yaml" configs/tiny.yaml --data.train_data_dir out/emoji
  accelerate launch --config_file configs/accelerate/cpu.yaml -m ztrain.train \
    --config "configs/$list.yaml" configs/tiny.yaml \
    --data.train_data_dir out/emoji --output_dir "runs/tiny/$list" --train.max_train_steps "$steps"
done

ztrain compare --config configs/splice.yaml configs/tiny.yaml --data.train_data_dir out/emoji \
  --compare.adapters "${runs[@]/%//export}" --compare.output_dir out/compare
