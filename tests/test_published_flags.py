"""The published command lines are accepted, and docs/published-flags.md names only flags that exist."""

import re

import pytest

from common.cli import flag_of, make_parser, settings
from evaluations.evaluator import EvaluatorConfig
from generation.config import GenerateConfig
from tests.conftest import ROOT
from training.config import TrainConfig, parse_args

REG_TRAIN = """--report-to=wandb --allow-tf32 --mixed-precision=fp16 --seed=0 --path-type=linear --prediction=v
    --weighting=uniform --model=SiT-B/2 --enc-type=dinov2-vit-b --proj-coeff=0.5 --encoder-depth=4
    --output-dir=your_path --exp-name=reg_xlarge_dinov2_base_align_8_cls --batch-size=256 --data-dir=data --cls=0.03"""
REPA_TRAIN = """--report-to=wandb --allow-tf32 --mixed-precision=fp16 --seed=0 --path-type=linear --prediction=v
    --weighting=uniform --model=SiT-XL/2 --enc-type=dinov2-vit-b --proj-coeff=0.5 --encoder-depth=8 --output-dir=exps
    --exp-name=linear-dinov2-b-enc8 --data-dir=data --ops-head=16 --resume-step=0 --sampling-steps=10000"""
GENERATE = """--model SiT-XL/2 --num-fid-samples 50000 --ckpt 4000000.pt --path-type=linear --encoder-depth=8
    --projector-embed-dims=768 --per-proc-batch-size=64 --mode=sde --num-steps=250 --cfg-scale=2.3 --cls-cfg-scale=2.3
    --guidance-high=0.85 --sample-dir samples --cls=768"""
EVALUATE = """--ref_batch ref.npz --sample_batch samples.npz --save_path out --cfg_cond 1 --step 4000000 --num_steps 250
    --cfg 2.3 --cls_cfg 2.3 --gh 0.85"""


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


def test_the_training_command_of_reg(on_a_gpu):
    config = parse_args(REG_TRAIN.split())
    assert (config.model, config.encoder_depth, config.cls, config.slot) == ("SiT-B/2", 4, 0.03, "class")
    assert (config.batch_size, config.precision, config.proj_coeff, config.report_to) == (256, "fp16", 0.5, "wandb")


def test_the_training_command_of_repa(on_a_gpu):
    config = parse_args([*REPA_TRAIN.split(), "--no-cls-token"])
    assert (config.model, config.encoder_depth, config.slot, config.ops_head) == ("SiT-XL/2", 8, "none", 16)
    assert (config.batch_size, config.resume_step, config.sampling_steps) == (256, 0, 10_000)


@pytest.mark.parametrize(("config_class", "line"), [(GenerateConfig, GENERATE), (EvaluatorConfig, EVALUATE)])
def test_the_commands_of_an_evaluation(config_class, line):
    values = vars(make_parser(config_class, "").parse_args(line.split()))
    config = config_class(**{name: value for name, value in values.items() if value is not None})
    assert "250" in line and config.num_steps == 250


def test_the_page_names_flags_that_exist():
    page = (ROOT / "docs" / "published-flags.md").read_text()
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    known = {"train.py": TrainConfig, "generate.py": GenerateConfig, "evaluator.py": EvaluatorConfig}
    for program, config_class in known.items():
        flags = {flag_of(item) for item in settings(config_class).values()} | {"--lr"}
        named = re.findall(r"`(--[\w-]+)[^`]*`", sections[program])
        assert len(named) > 2 and {name.replace("--no-", "--") for name in named} <= flags
