import numpy as np
import pytest
import torch

from common.distributed import largest_batch, to_host
from common.io import InputError


def device_that_holds(images, tried):
    """Work that runs out of memory above a number of images."""

    def attempt(size):
        tried.append(size)
        if size > images:
            raise torch.cuda.OutOfMemoryError(f"{size} images do not fit")

    return attempt


@pytest.mark.parametrize(("holds", "found"), [(1000, 256), (256, 256), (255, 128), (20, 16), (1, 1)])
def test_the_largest_batch_that_fits_is_found(holds, found):
    tried = []
    assert largest_batch(device_that_holds(holds, tried), 256) == found
    assert tried == [256 >> i for i in range(len(tried))] and tried[-1] == found


def test_no_batch_fits():
    with pytest.raises(InputError, match=r"does not hold the work on a single image \(1 images do not fit\)"):
        largest_batch(device_that_holds(0, []), 8)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def attempt(size):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        largest_batch(attempt, 8)


def test_a_copy_to_the_host_gives_the_tensor():
    tensor = torch.arange(6).view(2, 3)
    assert np.array_equal(to_host(tensor)(), tensor.numpy())


@pytest.mark.gpu
def test_a_copy_from_the_gpu_is_complete_once_it_is_read():
    tensor = torch.randn(64, 1024, device="cuda")
    product = tensor @ tensor.T @ tensor
    arrived = to_host(product.T)
    product.zero_()  # after the copy, in the order of the stream
    assert np.array_equal(arrived(), (tensor @ tensor.T @ tensor).T.cpu().numpy())
