#!/usr/bin/env bash
# A miniature family from nothing on one GPU, then its scorecard.
#   launch/pretrain_miniature.sh OUT [SEED [--data DIR]]       from the project's root, with an active .venv
# Whatever stops, start it again: finished stages are skipped, the transformer goes on where it was.
set -euo pipefail
out=$1 seed=${2:-0}
world=("${@:3}")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}  # several processes share the cores

stages() { ztrain mini pretrain --out "$out" --seed "$seed" "${world[@]}" --stages "$@"; }

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT  # what fails takes the other with it
stages vae & first=$!
stages language
wait "$first"
stages transformer & first=$!
stages vision_language siglip judges
wait "$first"

ztrain mini pretrain --out "$out" --seed "$seed" "${world[@]}"  # all stages are done: writes the family
ztrain mini measure "$out/family" --out "$out/scorecard" --seed "$seed" "${world[@]}"
