"""Seeded changes to the command lines of every program."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, get_type_hints

from common.cli import Config, flag_of, settings
from tests.conftest import ENCODER
from tests.fuzzing.checkpoints import CANARY

CHANGES = (1, 1, 1, 1, 2, 2, 3)  # changes of one command line
PROCESS_FLAGS = ("workers", "parallel", "threads")  # large numbers would start that many processes
SOME_TEXT = (
    "", " ", "0", "-1", "1", "2", "0.5", "nan", "inf", "-inf", "1e400", "1e308", "1e-320", "9" * 25,
    "2147483648", "-5.5", "abc", "None", "true", "x" * 5000, "é", os.fsdecode(b"\xff\xfe"), "a b", "-", "--", "-x",
    "'", f"$(touch {CANARY})",
    "a,b", ",", "1,2", "0x10", "1_000", "٣", "%s%n", "{0}", "\n", "a\nb\x1b[31m", "~", ".", "..", "*", "auto", "cpu",
    "cuda", "latest", "none", "pixel", "timm/vit_tiny_patch16_224:checkpoint_path=evil.pt", "owner/name",
)  # fmt: skip
SOME_PATHS = (
    "missing", "missing/deep/a", "empty", "text.txt", "pipe", "zero", "null", "dead", "loop", "data", "data/images",
    "data/vae-sd", "data/images/dataset.json", "data/images/00000/img00000001.png", "photos", "photos/a/1.png",
    "images.zip", "encoder.safetensors", "exps/old", "exps/old/checkpoints", "exps/old/checkpoints/0000002.pt",
    "exps/old/args.json", "exps/old/metrics.jsonl", "samples/old", "samples/old/samples.npz",
    "samples/old/samples.json", "set.npz", "ref.npz", "export.safetensors", "evil.pt", "eps/evil.png",
    "config.json", "x" * 300, "a/" * 2000 + "b",
    "text.txt/a", "evil.pt/a", os.fsdecode(b"\xff.npz"), "new.npz", "new.zip", "new.json", "new", "a\nb.png",
    "data/../data",
)  # fmt: skip
SOME_CONFIGS = (
    '{"seed": 1}', "[]", "{", '{"unknown": 1}', '{"config": "a.json"}', '{"seed": "a"}', '{"seed": 1e999}', "null",
    '{"seed": [1, 2]}', '{"seed": {"a": 1}}', "[" * 100_000, '{"seed": NaN}', '{"dest": 1, "out": 2, "source": 3}',
)  # fmt: skip
SOME_ENVIRONMENT = (
    {"ACCELERATE_MIXED_PRECISION": "fp16"}, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"},
    {"ACCELERATE_USE_FSDP": "true"}, {"ACCELERATE_DYNAMO_BACKEND": "inductor"}, {"ACCELERATE_MIXED_PRECISION": "x"},
    {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "a"}, {"WORLD_SIZE": "2"}, {"RANK": "1"}, {"LOCAL_RANK": "a"},
    {"WORLD_SIZE": "0", "RANK": "0"}, {"OMP_NUM_THREADS": "a"}, {"TMPDIR": "missing"}, {"HOME": "missing"},
    {"TQDM_DISABLE": "x"}, {"ACCELERATE_USE_DEEPSPEED": "true"}, {"ACCELERATE_USE_CPU": "yes"},
    {"LANG": "C", "LC_ALL": "C"},
)  # fmt: skip


@dataclass(frozen=True)
class Program:
    """A program: its file, its settings, a valid command line, and its share of all command lines.

    Attributes:
        outputs: flags that name what is written.
        own: files of the work folder that the valid command may change.
    """

    path: str
    config: str  # module:class
    line: str
    share: int = 1
    outputs: tuple[str, ...] = ()
    own: tuple[str, ...] = ()

    @property
    def config_class(self) -> type[Config]:
        module, name = self.config.split(":")
        return getattr(import_module(module), name)


_NETWORK = (
    f"--data-dir data --device cpu --enc-type {ENCODER} --enc-weights encoder.safetensors --model SiT-S/4 --depth 1 "
    "--hidden-size 16 --num-heads 2 --encoder-depth 1 --projector-dim 8 --batch-size 4 --num-workers 0 --log-steps 1 "
    "--sampling-steps 0"
)
FIRST_RUN = f"--output-dir exps --exp-name old {_NETWORK} --max-train-steps 2"
FIRST_SAMPLES = (
    "--ckpt exps/old/checkpoints/0000002.pt --sample-dir samples --name old --device cpu --num-fid-samples 3 "
    "--num-steps 2 --per-proc-batch-size 2"
)
_RUN = ("exps/old/",)
PROGRAMS = {
    "train.py": Program(
        "train.py", "training.config:TrainConfig", FIRST_RUN.replace("exps --exp-name old", "out --exp-name new"), 6,
        ("--output-dir", "--exp-name", "--logging-dir"),
    ),
    "train.py-resume": Program(
        "train.py", "training.config:TrainConfig", FIRST_RUN.replace("steps 2", "steps 3") + " --resume latest", 3,
        ("--output-dir", "--exp-name", "--logging-dir"), _RUN,
    ),
    "generate.py": Program(
        "generate.py", "generation.config:GenerateConfig",
        FIRST_SAMPLES.replace("samples --name old", "out --name new"), 5, ("--sample-dir", "--name"), ("samples/old/",),
    ),
    "export.py": Program("export.py", "export:ExportConfig", "--ckpt exps/old --dest out.safetensors", 3, ("--dest",)),
    "convert.py": Program(
        "preprocessing/convert.py", "preprocessing.convert:ConvertConfig",
        "--source photos --dest out --resolution 16 --workers 1", 4, ("--dest",),
    ),
    "encode.py": Program(
        "preprocessing/encode.py", "preprocessing.encode:EncodeConfig",
        "--source data/images --dest out --vae pixel --workers 0", 4, ("--dest",),
    ),
    "encode_tokens.py": Program(
        "preprocessing/encode_tokens.py", "preprocessing.encode_tokens:EncodeTokensConfig",
        f"--source data/images --dest out --enc-type {ENCODER} --enc-weights encoder.safetensors --workers 0", 3,
        ("--dest",),
    ),
    "verify.py": Program(
        "preprocessing/verify.py", "preprocessing.verify:VerifyConfig",
        "data --device cpu --workers 1 --reconstruct 2 --sheet sheet.png", 4, ("--sheet",),
    ),
    "dataset_tools.py": Program(
        "preprocessing/dataset_tools.py", "preprocessing.dataset_tools:PublishedConvertConfig",
        "convert --source photos --dest out --resolution 16x16 --workers 1", 3, ("--dest",),
    ),
    "evaluator.py": Program(
        "evaluations/evaluator.py", "evaluations.evaluator:EvaluatorConfig",
        "ref.npz set.npz --save_path out.json --cpu", 5, ("--save_path", "--cache"),
    ),
    "reference.py": Program(
        "evaluations/reference.py", "evaluations.reference:ReferenceConfig", "--source set.npz --dest out.npz --cpu", 4,
        ("--dest",),
    ),
    "plot.py": Program(
        "evaluations/plot.py", "evaluations.plot:PlotConfig", "exps/old/fid.jsonl --out out.png", 3, ("--out",)
    ),
    "convergence.py": Program(
        "experiments/convergence.py", "experiments.convergence:Convergence", "--preset imagenet --out out", 2,
        ("--out", "--report"),
    ),
    "digits.py": Program("experiments/digits.py", "experiments.digits:Digits", "encoder-spec", 1, ("--dest",)),
    "demo.py": Program("experiments/demo.py", "experiments.demo:Demo", "encoder-spec", 1, ("--dest",)),
    "benchmarks/attention.py": Program(
        "benchmarks/attention.py", "benchmarks.attention:AttentionBenchmark",
        "--device cpu --batch-size 1 --heads 1 --tokens 4 --head-size 8 --padded 16 --repeats 1", 1, ("--json",),
    ),
    "benchmarks/sample.py": Program(
        "benchmarks/sample.py", "benchmarks.sample:Sample",
        "--ckpt exps/old --resolution 16 --batch-size 1 --steps 2 --timed-steps 1 --rounds 1 --pairs 0 "
        "--matrix-seconds 0 --no-compile --dtype float32 --device cpu --deviation-steps 1", 1, ("--json",),
    ),
    "benchmarks/encode.py": Program(
        "benchmarks/encode.py", "benchmarks.encode:Encode",
        "--work loader --data data --batches 1 --workers 0 --rounds 1 --device cpu", 1, ("--json",),
    ),
    "benchmarks/evaluate.py": Program(
        "benchmarks/evaluate.py", "benchmarks.evaluate:Evaluate", "--images 1 --batch-size 1 --repeats 1", 1,
        ("--json",),
    ),
    "benchmarks/train_step.py": Program(
        "benchmarks/train_step.py", "benchmarks.train_step:TrainStep",
        "--model SiT-S/8 --depth 1 --batch-size 1 --resolution 64 --encoder none --no-cls-token --forms ours "
        "--rounds 1 --steps 1 --matrix-seconds 0 --device cpu", 1, ("--json", "--profile", "--saves"),
    ),
}  # fmt: skip


class Command(NamedTuple):
    """A changed command line: the program, its arguments, environment variables, and the text of a --config file."""

    program: str
    argv: list[str]
    environment: dict[str, str]
    config: str


def command(rng: random.Random, name: str | None = None) -> Command:
    """Return a changed command line of a program, or of one drawn by share."""
    drawn = rng.choices(list(PROGRAMS), [program.share for program in PROGRAMS.values()])[0]
    name = name or drawn  # drawn in both cases, so that a command line can be repeated with the name of its program
    program = PROGRAMS[name]
    groups = groups_of(program.line.split())
    environment, text = {}, rng.choice(SOME_CONFIGS)
    for _ in range(rng.choice(CHANGES)):
        kind = rng.random()
        if kind < 0.07 and groups:
            groups.pop(rng.randrange(len(groups)))
        elif kind < 0.14 and groups:
            groups.append(list(rng.choice(groups)))
            _change_value(rng, groups[-1])
        elif kind < 0.44 and groups:
            _change_value(rng, rng.choice(groups))
        elif kind < 0.6:
            _exchange(rng, program, groups)
        elif kind < 0.87:
            groups.append(_more(rng, program))
        elif kind < 0.91:
            groups.append([rng.choice(("--unknown", "--seeed", "-x", "--", "--=", "--é", "extra", "--config=")), "1"])
        elif kind < 0.96:
            groups.append(["--config", rng.choice(("config.json", "config.json", *SOME_PATHS))])
        else:
            environment |= rng.choice(SOME_ENVIRONMENT)
    argv = [word for group in groups for word in group]
    return Command(name, [word.replace("\0", "") for word in argv], environment, text)


def groups_of(words: Sequence[str]) -> list[list[str]]:
    """Return a command line as a list of flags, each with its values."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not groups or not groups[-1][0].startswith("--"):
            groups.append([word])
        else:
            groups[-1].append(word)
    return groups


def _value(rng: random.Random, name: str) -> str:
    if any(part in name for part in PROCESS_FLAGS):
        return rng.choice(("0", "1", "2", "-1", "a", "", "nan"))
    if rng.random() < 0.25:
        return rng.choice(("1", "2", "3", "4", "0.5", "16"))
    return rng.choice(SOME_TEXT if rng.random() < 0.5 else SOME_PATHS)


def _change_value(rng: random.Random, group: list[str]) -> None:
    if len(group) == 1 and group[0].startswith("--"):
        group.append(_value(rng, group[0]))
    elif rng.random() < 0.1 and len(group) > 1:
        group.pop()
    elif rng.random() < 0.1:
        group.append(_value(rng, group[0]))
    elif rng.random() < 0.1 and group[0].startswith("--"):
        group[:] = [f"{group[0]}={_value(rng, group[0])}"]
    else:
        group[-1] = _value(rng, group[0])


def _exchange(rng: random.Random, program: Program, groups: list[list[str]]) -> None:
    """Give an output flag the value of another one, or a file near it."""
    outputs = [group for group in groups if group[0] in program.outputs and len(group) > 1]
    others = [group[-1] for group in groups if group[0] not in program.outputs]
    if outputs and others:
        value = rng.choice(others)
        near = (value, f"{value}/a", str(Path(value).parent), *(path for path in SOME_PATHS if path.startswith(value)))
        rng.choice(outputs)[-1] = rng.choice(near)


def _more(rng: random.Random, program: Program) -> list[str]:
    """Return a flag of the program with a value of its type, or with any value."""
    name, item = rng.choice(sorted(settings(program.config_class).items()))
    flag, hint = flag_of(item), str(get_type_hints(program.config_class)[name])
    if "bool" in hint:
        return [rng.choice((flag, flag.replace("--", "--no-", 1)))]
    if item.metadata["choices"] and rng.random() < 0.8:
        value = rng.choice(item.metadata["choices"])
    elif rng.random() < 0.7 and ("int" in hint or "float" in hint):
        value = rng.choice(("0", "1", "2", "3", "4", "-1") if "int" in hint else ("0", "1", "0.5", "0.9", "2", "-1"))
    else:
        value = _value(rng, name)
    return [flag, value] if flag.startswith("-") else [value]
