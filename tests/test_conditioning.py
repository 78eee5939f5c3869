"""Whether a network was trained with labels, by the settings of its run."""

import pytest

from models.conditioning import has_null_class, is_unconditional

CODEC = {"codec": {"codec": "pixel"}}


@pytest.mark.parametrize(
    ("settings", "unconditional", "null_class"),
    [
        ({**CODEC, "cfg_prob": 1.0}, True, True),
        ({**CODEC, "cfg_prob": 1}, True, True),
        ({**CODEC, "cfg_prob": 0.9999}, False, True),
        ({**CODEC, "cfg_prob": 0.0}, False, False),
        (CODEC, False, True),
        ({**CODEC, "cfg_prob": "1"}, False, True),
        ({"cfg_prob": 1.0}, False, True),  # published files: the flag had no effect
        ({"cfg_prob": 0.0}, False, True),
    ],
)
def test_the_probability_of_dropping_labels_decides(settings, unconditional, null_class):
    assert is_unconditional(settings) is unconditional and has_null_class(settings) is null_class
