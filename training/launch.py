"""Starts a program on all devices of this machine, one process each, and ends them together.

    python training/launch.py --processes 8 train.py --data-dir DATA ...

What torchrun does for one machine of several (the processes meet at --head-address), and what it does not: SIGTERM,
SIGUSR1 and Ctrl-C reach every process, the exit status that says "resumable" comes out as it went in, and when one
process dies or hangs the others are ended and its name is told.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.io import InputError, run_cli
from training.lost_process import EXIT_LOST_PROCESS
from training.preemption import EXIT_RESUMABLE, SIGNALS

GRACE_SECONDS = 20.0  # for the others to end, after one has died
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 5.0  # between the first and the last of those that give up a process that hangs
DEFAULT_PORT = 29500


def main() -> None:
    """Run the program as the command line says and exit with its status."""
    args = parse_args()
    processes = start(args)
    asked_to_stop = False

    def pass_on(number: int, frame: object) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True
        for process in processes:  # a terminal's Ctrl-C has reached them already: twice, it would end in a traceback
            process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    rank = wait_for_failure(processes)
    if rank is None:
        return
    status = processes[rank].returncode
    killed_by = -status if status is not None and status < 0 else 0
    resumable = status == EXIT_RESUMABLE or (asked_to_stop and killed_by in SIGNALS)  # a signal before training began
    if not resumable and not asked_to_stop:
        name = f"process {args.machine_rank * args.processes + rank} on {socket.gethostname()}"
        print(f"launch.py: {name} {describe(status)}; ending the others", file=sys.stderr)
    end(processes, wait=resumable)
    sys.exit(EXIT_RESUMABLE if resumable else 128 + killed_by if killed_by else status or EXIT_LOST_PROCESS)


def parse_args() -> argparse.Namespace:
    """Return the settings; everything from the program's name on is the program's."""
    parser = argparse.ArgumentParser(description="Start a program on all devices of this machine.", allow_abbrev=False)
    add = parser.add_argument
    add("--processes", type=int, default=1, help="on this machine, one for each GPU (%(default)s)")
    add("--machines", type=int, default=1, help="that run this command, all with as many processes (%(default)s)")
    add("--machine-rank", type=int, default=0, help="of this machine, from 0 (%(default)s)")
    add("--head-address", default="127.0.0.1", help="of the machine with rank 0 (%(default)s)")
    add("--head-port", type=int, help=f"a free port there (one machine: any that is free; several: {DEFAULT_PORT})")
    add("--cpu", action="store_true", help="compute on the CPU")
    add("command", nargs=argparse.REMAINDER, help="the program and its arguments")
    args = parser.parse_args()
    if args.processes < 1 or not 0 <= args.machine_rank < args.machines:
        raise InputError(
            f"--processes {args.processes}, --machine-rank {args.machine_rank} of --machines {args.machines}: allowed "
            "are 1 or more processes, and ranks from 0 to the number of machines less 1"
        )
    if not args.command:
        raise InputError("no program given")
    if args.head_port is None:
        args.head_port = DEFAULT_PORT if args.machines > 1 else free_port()
    if args.machine_rank == 0 and not is_free(args.head_port):
        raise InputError(f"--head-port {args.head_port}: not to be had on this machine; name a free port")
    return args


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def is_free(port: int) -> bool:
    """Return whether a program may listen on a port."""
    with socket.socket() as listener, contextlib.suppress(OSError, OverflowError):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one just given back counts as free
        listener.bind(("", port))
        return True
    return False


def start(args: argparse.Namespace) -> list[subprocess.Popen]:
    """Start the processes with the variables by which PyTorch's process groups find each other."""
    total = args.processes * args.machines
    processes = []
    for local_rank in range(args.processes):
        environment = dict(os.environ)
        if args.cpu:
            environment["ACCELERATE_USE_CPU"] = "true"
        if total > 1:
            environment |= {
                "RANK": str(args.machine_rank * args.processes + local_rank),
                "LOCAL_RANK": str(local_rank),
                "WORLD_SIZE": str(total),
                "LOCAL_WORLD_SIZE": str(args.processes),
                "MASTER_ADDR": args.head_address,
                "MASTER_PORT": str(args.head_port),
            }
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.processes)))
        processes.append(subprocess.Popen([sys.executable, *args.command], env=environment))
    return processes


def wait_for_failure(processes: list[subprocess.Popen]) -> int | None:
    """Wait until one has failed and return its number; None if all ended well.

    One that ended for want of another is not to blame: another that failed is, or else one that still runs when those
    that wait for it have given up, for it hangs.
    """
    gave_up_at = None
    while True:
        states = [process.poll() for process in processes]
        failed = [rank for rank, status in enumerate(states) if status]
        if guilty := [rank for rank in failed if states[rank] != EXIT_LOST_PROCESS]:
            return min(guilty, key=lambda rank: states[rank] > 0)  # killed, rather than in trouble because of that
        if failed:
            gave_up_at = gave_up_at or time.monotonic()
            running = [rank for rank, status in enumerate(states) if status is None]
            if not running or time.monotonic() > gave_up_at + PATIENCE_SECONDS:
                return (running or failed)[0]
        elif all(status == 0 for status in states):
            return None
        time.sleep(POLL_SECONDS)


def end(processes: list[subprocess.Popen], wait: bool) -> None:
    """End the processes that still run: at once those that can only wait for the dead one, or after they have saved."""
    deadline = time.monotonic() + GRACE_SECONDS
    while wait and any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    for process in processes:
        if process.poll() is None:
            process.kill()  # they would take a softer signal as a wish to save, together with the dead one
        process.wait()


def describe(status: int | None) -> str:
    """Return in words how a process ended, or that it did not."""
    if status is None:
        return "did not answer and still runs"
    if status == EXIT_LOST_PROCESS:
        return "waited in vain for another"
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


if __name__ == "__main__":
    run_cli(main)
