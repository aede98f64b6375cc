#!/usr/bin/env bash
# Slurm, one launcher per node and one process per GPU; resumes by itself after a pre-emption or the time limit:
#   sbatch --nodes 2 --gpus-per-node 8 launch/slurm.sh --config configs/quickstart.yaml
#SBATCH --job-name=offload-sparse
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
# Five minutes before the limit Slurm sends SIGUSR1 to this script, and SIGTERM on pre-emption. It passes SIGUSR1 on to the
# training processes, which save a checkpoint and exit with 0 (the launchers ignore it); then the job queues itself again.
# A run that is complete, or that fails by itself, is not queued again. Every node must see the working directory.
set -uo pipefail

gpus=${SLURM_GPUS_ON_NODE:-1}
cpus=${SLURM_CPUS_PER_TASK:-$gpus}
export SRUN_CPUS_PER_TASK=$cpus # since Slurm 22.05 srun does not take it from sbatch
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cpus / gpus))}"
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

signals=0
trap 'signals=$((signals + 1)); scancel --signal=USR1 "$SLURM_JOB_ID"' USR1 TERM

# The quotes keep $SLURM_NODEID for the nodes, where it differs.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
    trap "" USR1
    exec accelerate launch --config_file launch/multi_node.yaml --num_machines "$1" --num_processes "$2" \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$3" --main_process_port "$4" launch/train.py "${@:5}"
' launcher "$SLURM_JOB_NUM_NODES" "$((SLURM_JOB_NUM_NODES * gpus))" "$host" "$port" "$@" &
step=$!

waited_at=-1
until [ "$waited_at" -eq "$signals" ]; do # a signal ends `wait`, not what it waits for
    waited_at=$signals
    wait "$step"
    code=$?
done
if [ "$signals" -gt 0 ] && [ "$code" -eq 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
