# Starts a program with torchrun, one process for each GPU, on one or several machines. Sourced by train.sh and eval.sh.
#
# When a process fails or is killed, torchrun ends the other processes and starts all of them again, at most
# MAX_RESTARTS times. Training then resumes from its last checkpoint. Two things are done here instead of by torchrun:
#
# Signals. torchrun kills its processes 30 seconds after it received SIGTERM, but saving a large checkpoint can take
# longer. Therefore `launch` sends SIGTERM to the processes itself, and torchrun only waits until they have ended.
#
# Exit statuses. torchrun restarts the processes whatever the exit status of the failed one is, and its own exit status
# is then 1. Therefore programs write an exit status that a restart would not change into the file $REG_STATUS_FILE
# (common/io.py): 0 for a finished training run, 2 for bad input, 75 for a run stopped by a signal. If the file has
# content, launch/worker.sh does not start the program again, and `launch` returns the status from the file.
#
# On several machines, torchrun assigns the ranks: the process with rank 0 may run on any of them.

LAUNCH=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$LAUNCH/openmp.sh"

# Ends the script with an error message.
fail() {
    echo "$(basename "$0"): error: $*" >&2
    exit 2
}

# NUM_GPUS: of this machine, as CUDA_VISIBLE_DEVICES allows; 0: use the CPU
command -v python > /dev/null || fail "python is not in PATH; activate the Python environment first"
if [[ " $* " == *" --device cpu "* || " $* " == *" --device=cpu "* ]]; then
    NUM_GPUS=${NUM_GPUS:-0}
fi
for name in NUM_GPUS NUM_PROCESSES NUM_MACHINES MACHINE_RANK HEAD_PORT MAX_RESTARTS; do
    [[ ${!name:-0} =~ ^(0|[1-9][0-9]*)$ ]] || fail "$name ${!name}: must be a whole number, 0 or greater"
done
if [ "${NUM_GPUS:-}" != 0 ] && [[ " $* " != *" --device cpu "* && " $* " != *" --device=cpu "* ]]; then
    found=$(python -W ignore -c "import torch; print(torch.cuda.device_count())") ||
        fail "this Python environment has no PyTorch that works: $(command -v python)"
    hint="nvidia-smi shows GPUs and driver, and CUDA_VISIBLE_DEVICES may hide GPUs; NUM_GPUS=0 uses the CPU"
    ((found > 0)) || fail "PyTorch finds no GPU: $hint"
    NUM_GPUS=${NUM_GPUS:-$found}
    ((NUM_GPUS <= found)) || fail "NUM_GPUS $NUM_GPUS: PyTorch finds $found: $hint"
fi
NUM_PROCESSES=${NUM_PROCESSES:-$((NUM_GPUS > 0 ? NUM_GPUS : 1))} # on this machine
if [ -z "${NUM_MACHINES:-}${SLURM_STEP_ID:-}" ] && ((${SLURM_NNODES:-1} > 1)); then
    fail "the job has $SLURM_NNODES nodes, but only the first one runs this script; start it by srun, with" \
        '--wrap "srun --kill-on-bad-exit=1 bash SCRIPT" in place of SCRIPT'
fi
NUM_MACHINES=${NUM_MACHINES:-${SLURM_NNODES:-1}}                 # all with the same number of processes
MACHINE_RANK=${MACHINE_RANK:-${SLURM_NODEID:-0}}                 # 0 on the head machine, then 1, 2, ...
HEAD_PORT=${HEAD_PORT:-$((NUM_MACHINES > 1 ? 29500 : 0))}        # free on the head machine; 0: torchrun chooses one
MAX_RESTARTS=${MAX_RESTARTS:-3}                                  # after failed processes
INTERRUPTED=0                                                    # 1 after Ctrl-C
EXIT_RESUMABLE=75                                                # of a program that was stopped and can be resumed
if [ -z "${HEAD_ADDRESS:-}" ] && ((NUM_MACHINES > 1)) && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    command -v scontrol > /dev/null ||
        fail "scontrol is not in PATH; set HEAD_ADDRESS to the first node of $SLURM_JOB_NODELIST"
    HEAD_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
if [ -z "${HEAD_ADDRESS:-}" ] && ((NUM_MACHINES > 1)); then
    fail "NUM_MACHINES $NUM_MACHINES: HEAD_ADDRESS is required, the address of the machine with MACHINE_RANK 0"
fi
HEAD_ADDRESS=${HEAD_ADDRESS:-127.0.0.1} # of the head machine
if ((NUM_PROCESSES == 0 || NUM_MACHINES == 0)); then
    fail "NUM_PROCESSES $NUM_PROCESSES, NUM_MACHINES $NUM_MACHINES: must be 1 or greater"
fi
((HEAD_PORT < 65536)) || fail "HEAD_PORT $HEAD_PORT: must be less than 65536"

if ((${SLURM_STEP_NUM_TASKS:-1} > ${SLURM_STEP_NUM_NODES:-1} || ${SLURM_LOCALID:-0} > 0)); then
    fail "more than one SLURM task on this node: one task per node starts the processes of all its GPUs; submit the job" \
        "with --ntasks-per-node 1"
fi
if ((MACHINE_RANK < 0 || MACHINE_RANK >= NUM_MACHINES)); then
    fail "MACHINE_RANK $MACHINE_RANK with NUM_MACHINES $NUM_MACHINES: allowed are 0 to $((NUM_MACHINES - 1))"
fi

if ((NUM_GPUS == 0)); then
    export ACCELERATE_USE_CPU=true
fi
if ((NUM_PROCESSES > 1)); then # torchrun's own default is 1 thread
    threads=$(($(getconf _NPROCESSORS_ONLN) / NUM_PROCESSES))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
fi
if [[ $(trap -p HUP) == *"''"* ]]; then # nohup; by default torchrun would end at SIGHUP nevertheless
    export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT
fi
# By default, all restarts share one key-value store, and new processes may read the addresses of dead ones there.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Some SLURM configurations send SIGTERM to torchrun as well. It then kills its processes after this many seconds;
# before PyTorch 2.12, always after 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}

# Runs a program with its flags and returns its exit status. Relative paths mean the folder of the caller.
launch() {
    local status torchrun="" is_head=$((MACHINE_RANK == 0))
    local flags=(--nnodes "$NUM_MACHINES" --nproc-per-node "$NUM_PROCESSES" --max-restarts "$MAX_RESTARTS")
    flags+=(--rdzv-backend c10d --rdzv-id reg --rdzv-endpoint "$HEAD_ADDRESS:$HEAD_PORT")
    flags+=(--rdzv-conf "is_host=$is_head,read_timeout=600") # seconds to wait for the head machine
    if ((is_head)); then
        flags+=(--local-addr "$HEAD_ADDRESS")
    fi
    REG_STATUS_FILE=$(mktemp)
    export REG_STATUS_FILE
    trap stop_processes TERM HUP QUIT USR1
    trap 'INTERRUPTED=1; stop_processes' INT

    # torchrun gets a process group of its own (set -m), so that Ctrl-C in a terminal reaches only this script.
    # SIGUSR1 would end torchrun, so it is ignored there.
    set -m
    (
        trap '' USR1
        exec python -m torch.distributed.run "${flags[@]}" --no-python bash "$LAUNCH/worker.sh" "$@"
    ) < /dev/null &
    torchrun=$!
    set +m
    while true; do # a signal interrupts `wait`
        status=0
        wait "$torchrun" || status=$?
        kill -0 "$torchrun" 2> /dev/null || break
    done

    trap - TERM HUP QUIT USR1 INT
    if [ -s "$REG_STATUS_FILE" ]; then
        status=$(cat "$REG_STATUS_FILE")
    fi
    rm -f "$REG_STATUS_FILE"
    return "$status"
}

# Sends SIGTERM to the processes of torchrun. Processes that torchrun starts later will not start the program.
stop_processes() {
    [ -s "$REG_STATUS_FILE" ] || echo "$EXIT_RESUMABLE" > "$REG_STATUS_FILE"
    local processes
    processes=$(cat "/proc/$torchrun/task/$torchrun/children" 2> /dev/null || pgrep -P "$torchrun") || return 0
    # shellcheck disable=SC2086 # one argument for each process
    kill -TERM $processes 2> /dev/null || true
}
