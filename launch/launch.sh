# How train.sh and eval.sh start a program on all GPUs of all machines. Sourced, not run.
# Under SLURM, with one task on each machine, the job says how many machines there are and which is the head.

# NUM_GPUS: of this machine, as CUDA_VISIBLE_DEVICES leaves them; 0: one process on the CPU
NUM_GPUS=${NUM_GPUS:-$(python -c "import torch; print(torch.cuda.device_count())")}
NUM_MACHINES=${NUM_MACHINES:-${SLURM_NNODES:-1}} # all with the same number of GPUs
MACHINE_RANK=${MACHINE_RANK:-${SLURM_NODEID:-0}} # 0 on the head, then 1, 2, ...
if [ -z "${HEAD_ADDRESS:-}" ] && ((NUM_MACHINES > 1)) && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    HEAD_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
HEAD_ADDRESS=${HEAD_ADDRESS:-127.0.0.1} # of the machine with rank 0
HEAD_PORT=${HEAD_PORT:-}                # a free port there; empty: launch.py's choice
INTERRUPTED=0                           # whether by Ctrl-C
EXIT_RESUMABLE=75                       # the status of a program that was asked to stop and can go on

# Runs the program; signals that reach the script on the way reach the program.
launch() {
    local processes=$((NUM_GPUS > 0 ? NUM_GPUS : 1)) status=0
    local flags=(--processes "$processes" --machines "$NUM_MACHINES" --machine-rank "$MACHINE_RANK")
    flags+=(--head-address "$HEAD_ADDRESS" ${HEAD_PORT:+--head-port "$HEAD_PORT"})
    ((NUM_GPUS == 0)) && flags+=(--cpu)
    python training/launch.py "${flags[@]}" "$@" &
    local launcher=$!
    trap 'kill -TERM "$launcher" 2>/dev/null' TERM
    trap 'INTERRUPTED=1; kill -TERM "$launcher" 2>/dev/null' INT # bash hides Ctrl-C from what it starts with &
    trap 'kill -USR1 "$launcher" 2>/dev/null' USR1
    while :; do # a signal interrupts the wait
        status=0
        wait "$launcher" || status=$?
        kill -0 "$launcher" 2>/dev/null || break
    done
    trap - TERM INT USR1
    return "$status"
}
