"""The statistics of a reference are those of a covariance, and of the network that they are compared with."""

from pathlib import Path

import numpy as np
import pytest

from common.errors import InputError
from evaluations.comparison import load_reference
from tests.test_evaluator import write_batch


def test_reference_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'mu' is float64 \(7,\), expected .* \(2048,\)"):
        load_reference(write_batch(tmp_path / "ref.npz", 4, mu=np.zeros(7), sigma=np.eye(7)))
    with pytest.raises(InputError, match="no array 'sigma'"):
        load_reference(write_batch(tmp_path / "ref.npz", 4, mu=np.zeros(2048)))
    with pytest.raises(InputError, match=r"ref\.npz: 'mu' contains numbers that are not finite"):
        load_reference(write_batch(tmp_path / "ref.npz", 4, mu=np.full(2048, np.nan), sigma=np.eye(2048)))


def statistics_file(path: Path, **arrays: object) -> Path:
    """Write statistics of class tokens of width 2, with some arrays replaced."""
    good = {"mu_enc": np.zeros(2), "sigma_enc": np.eye(2), "encoder": np.array("name"), "encoder_input": np.array(224)}
    np.savez(path, **(good | arrays))
    return path


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"sigma_enc": np.array([[1.0, 0.5], [0.1, 1.0]])}, "'sigma_enc' is not symmetric"),
        ({"sigma_enc": -np.eye(2)}, "'sigma_enc' has negative variances"),
        ({"sigma_enc": np.eye(3)}, r"'sigma_enc' is float64 \(3, 3\)"),
        ({"sigma_enc": np.full((2, 2), np.nan)}, "'sigma_enc' contains numbers that are not finite"),
        ({"mu_enc": np.array([0, np.inf])}, "'mu_enc' contains numbers that are not finite"),
        ({"mu_enc": np.zeros(0), "sigma_enc": np.zeros((0, 0))}, "'mu_enc' is empty"),
        ({"num_images": np.array(-5)}, "'num_images' is -5; allowed: 1 or more"),
        ({"encoder_input": np.array(0)}, "'encoder_input' is 0; allowed: 1 or more"),
        ({"encoder": np.array(b"name")}, "'encoder' is"),
    ],
)
def test_statistics_that_are_none_are_refused(tmp_path: Path, arrays: dict, problem: str) -> None:
    with pytest.raises(InputError, match=rf"r\.npz: {problem}"):
        load_reference(statistics_file(tmp_path / "r.npz", **arrays))


def test_statistics_of_another_input_size_are_not_used(tmp_path: Path) -> None:
    found = load_reference(statistics_file(tmp_path / "r.npz"))
    assert found.of_encoder("name", 224) is not None
    assert found.of_encoder("name", 112) is None and found.of_encoder("other", 224) is None
