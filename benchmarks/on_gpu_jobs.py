"""What on_gpu.py runs: the parts, and the columns of the results that it prints at its end."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

TINY_ENCODER = "timm/vit_tiny_patch16_224:input=64:patch_size=64:depth=1:embed_dim=24:num_heads=2"
RUN_ENCODER = "timm/vit_tiny_patch16_224:input=32:patch_size=8:depth=1:embed_dim=24:num_heads=2"

# Flags, followed by those that replace them with --size tiny. {out}: the file of a job's results, without
# suffix. {work}: a folder for all else.
STEP = "benchmarks/train_step.py --device cuda --precision bf16 --steps 3 --json {out}.json"
TINY_STEP = f"--device cpu --precision no --model SiT-S/8 --depth 2 --batch-size 2 --resolution 64 --steps 1 \
    --encoder {TINY_ENCODER} --backend eager --matrix-seconds 0 --seconds 1"
TINY_STEP_ONE_BATCH = f"{TINY_STEP} --no-largest-batch"
SAMPLE = "benchmarks/sample.py --device cuda --model SiT-XL/2 --batch-size 64 --timed-steps 10 --json {out}.json"
TINY_SAMPLE = "--device cpu --model SiT-S/8 --resolution 64 --batch-size 2 --steps 20 --timed-steps 1 \
    --deviation-steps 2 --no-compile --matrix-seconds 0 --seconds 1"
RUN = "benchmarks/real_run.py --device cuda --compile --json {out}.json"
TINY_RUN = f"--device cpu --no-compile --precision no --encoder {RUN_ENCODER} --model SiT-S/8 --depth 2 --images 16 \
    --batch-size 4 --steps 4 --num-workers 0 --samples 3"


@dataclass(frozen=True)
class Job:
    """One program of a part.

    name: of its results. limit: seconds. flags: the program and its flags. tiny: flags that are added with --size tiny.
    results: suffix of the file that a complete job has written.
    """

    name: str
    limit: int
    flags: str
    tiny: str
    results: str = ".json"

    def command(self, work: Path, size: str) -> list[str]:
        """Return the command that writes the results into the folder `work`/results."""
        text = f"{self.flags} {self.tiny if size == 'tiny' else ''}"
        places = {"work": work.absolute(), "out": work.absolute() / "results" / self.name}
        return [sys.executable, *(word.format(**places) for word in shlex.split(text))]


PARTS = {
    # What has to be known first: are the goals for training, sampling and evaluation reached?
    "part1": [
        Job(
            "train_step",
            200,
            f"{STEP} --model SiT-XL/2 --forms plain ours compile --batch-size 32 --largest-batch --seconds 155 "
            "--profile {out}.trace.json.gz",
            TINY_STEP_ONE_BATCH,
        ),
        Job("sample", 110, f"{SAMPLE} --dtype bf16 --pairs 0 --seconds 90", TINY_SAMPLE),
        Job(
            "evaluate",
            50,
            "benchmarks/evaluate.py --device cuda --batch-size auto --images 512 --evaluate 50000 --seconds 35 "
            "--json {out}.json",
            "--device cpu --images 1 --batch-size 1 --evaluate 4 --references 4 --seconds 1",
        ),
        Job(
            "attention",
            20,
            "benchmarks/attention.py --device cuda --batch-size 256 --heads 16 --tokens 257 --head-size 72 "
            "--dtype bf16 --json {out}.json",
            "--device cpu --batch-size 2 --heads 2 --tokens 9 --dtype float32",
        ),
    ],
    # Do the tests pass, and do train.py and generate.py do the same on a GPU?
    "checks": [
        Job(
            "tests",
            300,
            "-m pytest -m gpu -vv --continue-on-collection-errors -p no:cacheprovider --durations 5 "
            "--junitxml {out}.xml",
            "tests/test_sync.py",
            results=".xml",
        ),
        Job("run", 260, RUN, TINY_RUN),
    ],
    # REG compared with SiT and REPA on rendered pictures; the same command resumes a comparison that was stopped.
    "convergence": [
        Job(
            "convergence",
            570,
            "experiments/convergence.py --preset solids --unlabelled --reg-flags '--standardize-cls tokens --cls 0.1' "
            "--flags '--mixed-precision bf16' --parallel 5 --out {work}/convergence --report {out}",
            "--images 4 --steps 4 --seeds 0 --samples 10 --parallel 1 --device cpu",
            results="",
        ),
    ],
    # Other networks, 512 px, fp16.
    "sizes": [
        Job(
            "sizes",
            200,
            f"{STEP} --model SiT-L/2 SiT-B/2 --forms plain ours compile --batch-size 32 --largest-batch --seconds 180",
            TINY_STEP_ONE_BATCH,
        ),
        Job(
            "px512",
            170,
            f"{STEP} --model SiT-XL/2 --resolution 512 --forms ours compile checkpointing --batch-size 8 "
            "--largest-batch --seconds 150",
            TINY_STEP_ONE_BATCH,
        ),
        Job(
            "fp16",
            110,
            f"{STEP} --model SiT-XL/2 --precision fp16 --forms ours compile --batch-size 32 --largest-batch "
            "--seconds 95",
            TINY_STEP_ONE_BATCH,
        ),
        Job("sample_fp16", 90, f"{SAMPLE} --dtype fp16 --pairs 0 --seconds 75", TINY_SAMPLE),
    ],
    # train.py with its loader, on images and latents of real size.
    "loader": [
        Job(
            "loader",
            300,
            f"{RUN} --codec sd --resolution 256 --images 4096 --encoder dinov2-vit-b --model SiT-XL/2 --batch-size 128 "
            "--steps 80 --precision bf16 --num-workers 12",
            f"{TINY_RUN} --resolution 64 --encoder {TINY_ENCODER}",
        ),
    ],
    # train.py with an encoder that runs, and with its cached tokens, of which the loader reads 395 kB per image.
    "tokens": [
        Job(
            "tokens",
            150,
            f"{RUN} --codec sd --resolution 256 --images 2048 --encoder dinov2-vit-b --model SiT-B/2 --batch-size 256 "
            "--steps 40 --precision bf16 --num-workers 12 --cached-tokens",
            f"{TINY_RUN} --resolution 64 --encoder {TINY_ENCODER}",
        ),
    ],
    # The price of the class slot in training and in sampling.
    "slot": [
        Job(
            "slot_training",
            280,
            f"{STEP} --model SiT-XL/2 --forms compile --slot-price --batch-size 16 --largest-batch --seconds 260",
            TINY_STEP_ONE_BATCH,
        ),
        Job("slot_sampling", 290, f"{SAMPLE} --dtype bf16 --pairs 20 --seconds 60", f"{TINY_SAMPLE} --pairs 1"),
    ],
    # Stable Diffusion's codec; needs the package diffusers.
    "codec": [
        Job(
            "encode",
            500,
            "benchmarks/encode.py --device cuda --dtype fp16 --json {out}.json",
            "--device cpu --resolution 32 --batch-size 2 --rounds 1 --no-compile --dtype float32",
        ),
    ],
    # Losses of 200 steps of all forms in bf16 and fp16, compared with float32.
    "losses": [
        Job(
            "losses",
            570,
            "benchmarks/train_step.py --device cuda --losses 200 --batches 8 --model SiT-B/2 --batch-size 32 "
            "--precision bf16 fp16 --json {out}.json",
            f"{TINY_STEP} --losses 4",
        ),
    ],
    # Time and memory by batch size; the largest batch without compilation.
    "growth": [
        Job(
            "growth",
            380,
            f"{STEP} --model SiT-XL/2 --forms compile --batch-size 32 64 128 256 --seconds 350",
            TINY_STEP,
        ),
        Job(
            "largest",
            150,
            f"{STEP} --model SiT-XL/2 --forms ours --batch-size 64 --largest-batch --seconds 130",
            TINY_STEP_ONE_BATCH,
        ),
    ],
}
