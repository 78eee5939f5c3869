"""Which tensors can be weights."""

import pytest
import torch

from common.errors import InputError
from models.tensor_checks import FLOAT_DTYPES, TooLargeError, check_finite, check_weights, parameters_at_most

NOT_WEIGHTS = [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", NOT_WEIGHTS)
def test_other_dtypes_are_refused(dtype):
    state = {"a": torch.zeros(2), "b": torch.zeros(2).to(dtype)}
    with pytest.raises(InputError, match=r"w\.pt: b has dtype \w+; allowed for weights: float32, bfloat16, float16"):
        check_weights(state, "w.pt")


def test_integers_are_allowed_where_files_of_encoders_have_them():
    check_weights({"bn.num_batches_tracked": torch.tensor(3)}, "w.pt", floats_only=False)
    for name, dtype in (("a", torch.int64), ("bn.num_batches_tracked", torch.int8)):
        with pytest.raises(InputError, match=f"{name} has dtype int"):
            check_weights({name: torch.zeros(2, dtype=dtype)}, "w.pt", floats_only=False)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"a": "text"}, r"w\.pt: a in its weights is a str; expected a tensor"),
        ({3: torch.zeros(1)}, r"w\.pt: its weights have the name 3; expected text"),
        ({"x" * 60_000: torch.zeros(1)}, r"its weights have the name 'xxx[^ ]{60,80}; expected text of at most 1000"),
    ],
)
def test_names_and_values_are_checked(state, text):
    with pytest.raises(InputError, match=text):
        check_weights(state, "w.pt")


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_numbers_that_are_not_finite_are_named(value, dtype):
    state = {name: torch.ones(3, 4, dtype=dtype) for name in "abc"}
    check_weights(state, "w.pt")
    check_finite(state, "w.pt")
    state["b"][2, 3] = value
    with pytest.raises(InputError, match=r"^w\.pt: b contains numbers that are not finite"):
        check_finite(state, "w.pt")


def test_large_numbers_are_finite():
    largest = torch.finfo(torch.float32).max
    check_finite({"a": torch.tensor([largest, largest, 0]), "empty": torch.zeros(0), "count": torch.tensor(3)}, "w.pt")
    check_finite({"a": torch.tensor([largest, -largest])}, "w.pt")


def test_a_network_that_is_too_large_is_not_built():
    with parameters_at_most(100):
        torch.nn.Linear(9, 9)
    with pytest.raises(TooLargeError), parameters_at_most(100):
        torch.nn.Sequential(torch.nn.Linear(9, 9), torch.nn.Linear(10**4, 10**4))
    torch.nn.Linear(20, 20)
