#!/usr/bin/env bash
# Train on GPU nodes under SLURM, one process per GPU: sbatch [--nodes=4 ...] tools/launch_slurm.sh --config=... --workdir=...
#
# jax finds the job by itself (--coordinator=auto reads SLURM's variables) and gives every task the GPU of its own number, so
# the tasks must see all GPUs of their node: --gpus-per-node, not --gpus-per-task. Two minutes before the time is over, and when
# the job is preempted, all processes save the same step; the script then puts the job back into the queue, and it goes on from
# there. The workdir must be on a file system that all nodes share.
#
# The environment is taken along; FLOWJAX_PYTHON names its Python (default: python).
#
# Not run by us on a cluster; tests/test_launch.py runs it with stand-ins for srun and scontrol.
#SBATCH --job-name=flowjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=flowjax-%j.log
set -uo pipefail
if [ $# -eq 0 ]; then echo "error: no flags for experiments.train" >&2; exit 2; fi

# srun passes the signal on to its tasks, all of which save and leave with 75.
trap 'kill -TERM "$step"' TERM
srun --kill-on-bad-exit=1 "${FLOWJAX_PYTHON:-python}" -m experiments.train --coordinator=auto --stopped=75 "$@" &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do  # the trap ended `wait`, not the step
  wait "$step"
  code=$?
done
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
