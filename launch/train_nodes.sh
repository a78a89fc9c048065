#!/usr/bin/env bash
# Trains on several machines: start it on each, with NODE 0 on the first, 1 on the second ... (launch/slurm.sh does it).
#   launch/train_nodes.sh STRATEGY CARDS NODES NODE HEAD WORD...     from the project's root, with an active .venv
#   launch/train_nodes.sh ddp 8 2 0 node-a --config configs/lora_24gb.yaml my.yaml --output_dir runs/mine
# STRATEGY: a file of configs/accelerate; CARDS: of each machine; HEAD: name of the first machine, where all meet at
# PORT; WORD: as for ztrain.train. Code, cache and output_dir lie at the same place on a file system that all share.
# SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU: every trainer of this machine saves at the same step as all others, and all
# end.
set -euo pipefail
strategy=$1 cards=$2 nodes=$3 node=$4 head=$5
if [[ $((nodes * cards)) -ne 1 ]] && grep -qs '^distributed_type: "NO"' "configs/accelerate/$strategy.yaml"; then
  echo "error: $strategy is a strategy of one process, not of $nodes x $cards; write ddp, fsdp2, zero2 or zero3" >&2
  exit 2
fi

accelerate launch --config_file "configs/accelerate/$strategy.yaml" --num_processes $((nodes * cards)) \
  --num_machines "$nodes" --machine_rank "$node" --main_process_ip "$head" --main_process_port "${PORT:-29500}" \
  --rdzv_backend c10d -m ztrain.train --resume_from_checkpoint latest "${@:6}" &
launcher=$!

# To the trainers themselves, which then save in their own time: the launcher would kill them after 30 s.
pass_on() { pkill "-$1" -P "$launcher" || kill -TERM "$launcher" || true; }
for name in HUP USR1 USR2 XCPU; do trap "pass_on $name" "$name"; done
trap 'pass_on TERM' TERM INT
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" || true; done  # a signal ends a wait
wait "$launcher"
