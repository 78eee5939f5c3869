"""Writes docs/flags.md, the flags of every program, from the programs' configuration classes.

python docs/flags.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common.cli import Config, flag_table
from common.temporary import atomic_write
from evaluations.evaluator import EvaluatorConfig
from evaluations.plot import PlotConfig
from evaluations.reference import ReferenceConfig
from export import ExportConfig
from generation.config import GenerateConfig
from preprocessing.convert import ConvertConfig
from preprocessing.encode import EncodeConfig
from preprocessing.encode_tokens import EncodeTokensConfig
from preprocessing.verify import VerifyConfig
from training.config import TrainConfig

PROGRAMS: dict[str, type[Config]] = {
    "train.py": TrainConfig,
    "generate.py": GenerateConfig,
    "export.py": ExportConfig,
    "preprocessing/convert.py": ConvertConfig,
    "preprocessing/encode.py": EncodeConfig,
    "preprocessing/encode_tokens.py": EncodeTokensConfig,
    "preprocessing/verify.py": VerifyConfig,
    "evaluations/evaluator.py": EvaluatorConfig,
    "evaluations/reference.py": ReferenceConfig,
    "evaluations/plot.py": PlotConfig,
}
INTRODUCTION = """# Flags

Written by `python docs/flags.py` from the configuration classes of the programs. Flags that are on or off are given as
`--flag` and `--no-flag`. A resumed run of train.py or generate.py may change the flags that are marked with *.
`--config FILE` of each program reads settings from a JSON file, such as args.json of a run; flags replace its values.
[published-flags.md](published-flags.md) compares the flags with those of the published scripts.
"""


def page() -> str:
    """Return the content of docs/flags.md."""
    return INTRODUCTION + "".join(f"\n## {name}\n\n{flag_table(config)}" for name, config in PROGRAMS.items())


if __name__ == "__main__":
    with atomic_write(ROOT / "docs" / "flags.md", "w") as file:
        file.write(page())
