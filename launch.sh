# How train.sh and eval.sh start a program on all GPUs of all machines. Sourced, not run.

# NUM_GPUS: of this machine, as CUDA_VISIBLE_DEVICES leaves them; 0: one process on the CPU
NUM_GPUS=${NUM_GPUS:-$(python -c "import torch; print(torch.cuda.device_count())")}
NUM_MACHINES=${NUM_MACHINES:-1}         # all with the same number of GPUs
MACHINE_RANK=${MACHINE_RANK:-0}         # 0 on the head, then 1, 2, ...
HEAD_ADDRESS=${HEAD_ADDRESS:-127.0.0.1} # of the machine with rank 0
HEAD_PORT=${HEAD_PORT:-29500}           # a free port there

launch() {
    if ((NUM_GPUS == 0)); then
        python "$@"
        return
    fi
    local flags=(--num_processes "$((NUM_GPUS * NUM_MACHINES))" --num_machines "$NUM_MACHINES")
    flags+=(--machine_rank "$MACHINE_RANK" --main_process_ip "$HEAD_ADDRESS" --main_process_port "$HEAD_PORT")
    flags+=(--mixed_precision no --dynamo_backend no) # the programs set their own
    if ((NUM_GPUS * NUM_MACHINES > 1)); then flags+=(--multi_gpu); fi
    accelerate launch "${flags[@]}" "$@"
}
