#!/usr/bin/env bash
# Trains on the cards of this machine. Started again with the same words, it goes on from the last checkpoint.
#   launch/train.sh STRATEGY CARDS WORD...     from the project's root, with an active .venv, for example
#   launch/train.sh ddp 8 --config configs/lora_24gb.yaml my.yaml --output_dir runs/mine
# STRATEGY: a file of configs/accelerate (one_gpu, ddp, fsdp2, zero2, zero3, cpu); WORD: as for ztrain.train, and of two
# that differ the last one counts: --resume_from_checkpoint none, or a checkpoint's folder, goes first.
set -euo pipefail
strategy=$1 cards=$2
if [[ $cards -ne 1 ]] && grep -qs '^distributed_type: "NO"' "configs/accelerate/$strategy.yaml"; then
  echo "error: $strategy is a strategy of one process, not of CARDS=$cards; write 1, or ddp, fsdp2, zero2 or zero3" >&2
  exit 2
fi
# What the launcher passes on, and the seconds that it gives the trainers to save. A SIGQUIT would only be their end.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGUSR2,SIGXCPU
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-300}
exec accelerate launch --config_file "configs/accelerate/$strategy.yaml" --num_processes "$cards" \
  --main_process_port 0 -m ztrain.train --resume_from_checkpoint latest "${@:3}"
