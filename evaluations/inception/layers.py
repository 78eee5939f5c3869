"""The layers of the Inception network of 2015-12-05, from torchvision's Inception-v3 (arXiv 1512.00567).

`classify_image_graph_def.pb`, in which the ADM evaluation (arXiv 2105.05233) computes its numbers, differs from
torchvision's network in three points: it has 1008 outputs, its average pools do not count the padding, and the last
block has a max pool in its pool branch.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import inception as v3

INPUT_SIZE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008  # 1000 classes of ImageNet and 8 unused ones
SPATIAL_LAYER = "Mixed_6d"  # its first 192 channels are the 1 x 1 branch, of which ADM's sFID uses the first 7

average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)


class _BlockA(v3.InceptionA):
    """35 x 35 positions."""

    def forward(self, x: Tensor) -> Tensor:
        branches = (
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(average_pool(x)),
        )
        return torch.cat(branches, 1)


class _BlockC(v3.InceptionC):
    """17 x 17 positions; 7 x 7 convolutions are split into 1 x 7 and 7 x 1."""

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branches = (
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(average_pool(x)),
        )
        return torch.cat(branches, 1)


class _BlockE(v3.InceptionE):
    """8 x 8 positions; two branches end in a 1 x 3 and a 3 x 1 convolution in parallel."""

    pool = staticmethod(average_pool)

    def forward(self, x: Tensor) -> Tensor:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = (
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        )
        return torch.cat(branches, 1)


def inception_layers() -> nn.Sequential:
    """Return the layers from the scaled image (N, 3, 299, 299) to the last feature map (N, 2048, 8, 8).

    Tensors have the names of the PyTorch port. They are on the meta device, without values.
    """
    blocks = [v3.BasicConv2d, _BlockA, v3.InceptionB, _BlockC, v3.InceptionD, _BlockE, v3.InceptionAux]
    with torch.device("meta"):
        network = v3.Inception3(NUM_CLASSES, aux_logits=False, inception_blocks=blocks, init_weights=False)
    network.Mixed_7c.pool = max_pool
    last = ("avgpool", "dropout", "fc")
    return nn.Sequential(OrderedDict((name, layer) for name, layer in network.named_children() if name not in last))


def convolutions(layers: nn.Sequential) -> list[str]:
    """Return the names of the convolutions with batch norm and ReLU, in the order of the TensorFlow graph."""
    return [name for name, module in layers.named_modules() if isinstance(module, v3.BasicConv2d)]
