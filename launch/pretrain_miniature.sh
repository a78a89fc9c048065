#!/usr/bin/env bash
# A miniature family from nothing on one GPU, then its scorecard.
#   launch/pretrain_miniature.sh OUT [SEED [--data DIR]]       from the project's root, with an active .venv
# Whatever stops, start it again: finished stages are skipped, the transformer goes on where it was.
# SMOKE=1 in front of it: tiny models on a CPU, which know nothing, show in a minute that all of it runs.
set -euo pipefail
out=$1 seed=${2:-0}
world=("${@:3}")
pretrain=(ztrain mini pretrain --out "$out" --seed "$seed" "${world[@]}")
measure=(ztrain mini measure "$out/family" --out "$out/scorecard" --seed "$seed" "${world[@]}")
if [[ -n ${SMOKE:-} ]]; then pretrain+=(--smoke) measure+=(--count 8 --steps 2); fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}  # several processes share the cores

trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT  # what fails takes the other with it

"${pretrain[@]}" --stages vae & first=$!
"${pretrain[@]}" --stages language & second=$!
wait "$first"; wait "$second"
"${pretrain[@]}" --stages transformer & first=$!
"${pretrain[@]}" --stages vision_language siglip judges & second=$!
wait "$second"; wait "$first"

"${pretrain[@]}"  # all stages are done: writes the family
"${measure[@]}"
