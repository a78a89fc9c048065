#!/usr/bin/env bash
# Fills the cache on all cards of this machine, or goes on filling it; training would do the same first.
#   launch/cache.sh CARDS WORD...     from the project's root, with an active .venv, for example
#   launch/cache.sh 8 --config configs/lora_24gb.yaml my.yaml
# On several machines that share the cache's folder: start it on each, at any time.
set -euo pipefail
exec accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes "$1" --main_process_port 0 \
  -m ztrain.cli cache "${@:2}"
