#!/usr/bin/env bash
#SBATCH --job-name=ztrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Trains as a SLURM job that saves and queues again before its time is over, until the run is done.
#   sbatch launch/slurm.sh STRATEGY RUN WORD...     from the project's root, with an active .venv, for example
#   sbatch --nodes=4 launch/slurm.sh ddp runs/mine --config configs/lora_24gb.yaml my.yaml
# USR1 (300 s before the time limit; scancel --batch --signal=USR1 JOB) and TERM (preemption): every rank saves at the
# same step, and the job is queued again. Not if the run was done or failed by itself: RUN/ended.json says so, where
# launchers report 1 for everything. Nor if the job was cancelled. A run that hung, or whose rank 0 was killed, is queued
# again if it has saved a checkpoint since this start: what never gets on ends.
set -euo pipefail
strategy=$1 run=$2
read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export PORT=${PORT:-$((20000 + SLURM_JOB_ID % 10000))}
rm -f "$run/ended.json"  # of an earlier start
newest() { find "$run/checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null | sort | tail -n 1; }
first=$(newest || true)

# One launcher a node. $SLURM_NODEID is known there only.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'exec launch/train_nodes.sh "$1" "$2" "$3" "$SLURM_NODEID" "${@:4}"' node \
  "$strategy" "$SLURM_GPUS_ON_NODE" "$SLURM_JOB_NUM_NODES" "$head" "${@:3}" --output_dir "$run" &
step=$!

told=
trap 'told=yes; kill -USR1 "$step" 2>/dev/null || true' USR1 TERM  # srun passes it on to every node
while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
status=0
wait "$step" || status=$?

# 0 done, 1 and 2 failed, 75 hung, above 128 stopped; nothing: rank 0 was killed
ended=$(grep -os '[0-9]*' "$run/ended.json" || true)
again=
case $ended in
  0 | 1 | 2) ;;
  '' | 75) [[ -n $told || ($status -ne 0 && $(newest || true) != "$first") ]] && again=yes ;;
  *) again=$told ;;
esac
if [[ -n $again && $(scontrol show job "$SLURM_JOB_ID") == *JobState=RUNNING* ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
