"""Settings of generate.py: what is refused, and the labels that they give."""

from argparse import Namespace

import pytest

from common.classes import ClassSet
from common.cli import parse
from common.errors import InputError
from generation.config import (
    LABEL_STREAM,
    GenerateConfig,
    check_against_checkpoint,
    choose_label_sampling,
    choose_path,
    image_labels,
    label_pool,
    unused_guidance,
)
from models.autoencoder import SD_FORMAT
from models.sit_config import SiTConfig
from samplers import Guidance, derive_seed
from tests.test_sit import small


def settings_of(line):
    return parse(GenerateConfig, "", line)


def test_labels_are_drawn_from_the_classes_of_the_training_data():
    numbers = ["--ckpt", "x.pt", "--num-fid-samples", "500"]
    drawn = image_labels(settings_of(numbers), ClassSet((5, 17, 940)).labels)
    assert set(drawn) == {5, 17, 940}
    balanced = image_labels(settings_of([*numbers, "--label-sampling", "balanced"]), (5, 17, 940))
    assert balanced[:4] == [5, 17, 940, 5]
    everything = image_labels(settings_of(numbers), ClassSet.of_network(3).labels)
    assert everything == [derive_seed(0, LABEL_STREAM, number) % 3 for number in range(500)]  # as before


UNLABELLED = {"cfg_prob": 1.0, "codec": SD_FORMAT.to_json()}


@pytest.mark.parametrize("given", [[], ["--label-sampling", "random"], ["--label-sampling", "none"]])
def test_a_network_trained_without_labels_gets_the_null_class(given):
    line = ["--ckpt", "x.pt", "--num-fid-samples", "3", *given]
    config = choose_label_sampling(settings_of(line), UNLABELLED)
    assert config.label_sampling == "none"
    assert image_labels(config, label_pool(config, ClassSet((0, 4)), 5)) == [5, 5, 5]
    for settings in ({}, {"cfg_prob": 1.0}, {**UNLABELLED, "cfg_prob": 0.1}):  # published files had no such flag
        assert choose_label_sampling(settings_of(line), settings) == settings_of(line)


@pytest.mark.parametrize(
    ("line", "settings", "message"),
    [
        ("--label-sampling balanced", UNLABELLED, r"--label-sampling balanced: x\.pt was trained without labels"),
        (
            "--classes 0,2-3",
            UNLABELLED,
            r"--classes 0,2-3: x\.pt was trained without labels \(--cfg-prob 1\), so",
        ),
        (
            "--cfg-scale 1.5",
            UNLABELLED,
            r"--cfg-scale 1\.5: x\.pt was trained without labels .* no guidance; all",
        ),
        ("--label-sampling none --classes 3", {}, "--label-sampling none contradicts --classes 3"),
        ("--label-sampling none --cfg-scale 2", {}, "--label-sampling none with --cfg-scale 2: guidance needs the lab"),
        (
            "--label-sampling none",
            {**UNLABELLED, "cfg_prob": 0.0},
            r"--label-sampling none: x\.pt was trained with --cfg-prob 0, so it has not learnt the null class; all",
        ),
    ],
)
def test_settings_that_need_labels_or_a_null_class_are_refused_without(line, settings, message):
    with pytest.raises(InputError, match=message):
        choose_label_sampling(settings_of(["--ckpt", "x.pt", *line.split()]), settings)


@pytest.mark.parametrize("name", ["--cfg-scale", "--cls-cfg-scale", "--guidance-low", "--guidance-high"])
@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "much"])
def test_numbers_that_are_not_finite_are_refused(name, value):
    with pytest.raises(InputError, match=f"{name}: '{value}' is not a finite number"):
        settings_of(["--ckpt", "x.pt", name, value])


@pytest.mark.parametrize("name", ["..", "a/../../b", "/tmp/a"])
def test_a_name_does_not_leave_the_folder_of_all_sets(name):
    with pytest.raises(InputError, match=rf"--name {name}: allowed: a folder in --sample-dir"):
        settings_of(["--ckpt", "x.pt", "--name", name])


def test_path_drop_guidance_needs_guidance_and_sprint():
    line = ["--ckpt", "x.pt", "--path-drop-guidance"]
    warning = "--path-drop-guidance has no effect: only --cfg-scale above 1 turns guidance on, and it is 1"
    assert unused_guidance(settings_of(line)) == [warning]
    config = settings_of([*line, "--cfg-scale", "2", "--guidance-high", "0.85"])
    assert unused_guidance(config) == [] and config.guidance == Guidance(2.0, 2.0, 0.0, 0.85, path_drop=True)
    with_sprint, without = small(depth=5, sprint=True), small(depth=5)
    assert check_against_checkpoint(config, {"args": Namespace()}, with_sprint.config, SD_FORMAT) == []
    with pytest.raises(InputError, match=r"--path-drop-guidance: x\.pt is a network without SPRINT"):
        check_against_checkpoint(config, {"args": Namespace()}, without.config, SD_FORMAT)


def test_a_scale_of_the_class_token_alone_is_warned_of():
    for flags in ([], ["--cfg-scale", "2"], ["--cfg-scale", "2", "--cls-cfg-scale", "3"], ["--cls-cfg-scale", "0"]):
        assert unused_guidance(settings_of(["--ckpt", "x.pt", *flags])) == []
    warning = "--cls-cfg-scale 2.3 has no effect: only --cfg-scale above 1 turns guidance on, and it is 1"
    assert unused_guidance(settings_of(["--ckpt", "x.pt", "--cls-cfg-scale", "2.3"])) == [warning]


@pytest.mark.parametrize(
    ("flags", "saved", "shift", "warnings"),
    [
        ([], {}, 1.0, []),
        ([], {"time_shift": 2.5}, 2.5, []),
        (["--time-shift", "2.5"], {"time_shift": 2.5}, 2.5, []),
        (["--time-shift", "2"], {"time_shift": 2.5}, 2.0, ["--time-shift is 2, but x.pt was trained with 2.5"]),
        (["--time-shift", "auto"], {}, 2**0.5, ["--time-shift is 1.41421, but x.pt records no time shift"]),
        (["--time-shift", "1"], {}, 1.0, []),
    ],
)
def test_the_time_shift_is_that_of_the_checkpoint_or_of_the_flag(flags, saved, shift, warnings):
    config, network = settings_of(["--ckpt", "x.pt", *flags]), SiTConfig(input_size=16, in_channels=32)
    path, said = choose_path(config, {"path_type": "cosine", **saved}, network)
    assert (path.path_type, said) == ("cosine", warnings) and path.time_shift == pytest.approx(shift)


@pytest.mark.parametrize("value", ["0", "1001", "-1"])
def test_an_impossible_time_shift_is_refused(value):
    with pytest.raises(InputError, match=rf"--time-shift {value}\.0: must be greater than 0 and at most 1000, or auto"):
        settings_of(["--ckpt", "x.pt", "--time-shift", value])
