"""A stand-in for classify_image_graph_def.pb: the same graph with made-up weights.

The original ADM evaluator needs a 95 MB TensorFlow graph.  This module writes a file with the node names, operations
and shapes that the evaluator relies on, from a recipe of a few hundred kB.  ADM's own program has run on it (TensorFlow
2.12.1, CPU), so our evaluator can be compared with it number for number where the real weights are not at hand.  The
scores mean nothing about images.

    python tests/adm_standin.py standin.pb

numpy and the standard library only.  The bytes do not depend on the machine: every random tensor has its own generator
seeded from its name, normals are rounded to multiples of 1/4096 (so the last bits of libm's log do not show) and
everything after that is IEEE elementwise arithmetic, without BLAS.
"""

import atexit
import functools
import hashlib
import math
import shutil
import struct
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

DATA = Path(__file__).with_name("data") / "adm_standin.npz"  # calibration; and features that TensorFlow computed
SHA256 = "c8eda0fd386b3b68c073e1e3c898f16ff780edab3d441adffe66ff2798b2a0ae"  # of the file that write_pb writes

DT_FLOAT, DT_INT32, DT_UINT8, DT_STRING = 1, 3, 4, 7


# ---------------------------------------------------------------- the graph


class Graph:
    """Nodes in order, as (name, op, inputs, attributes), and weight shapes.

    An attribute is a pair (kind, value); kind is a field of AttrValue, or
    "weight" for a constant whose value comes from weights().
    """

    def __init__(self):
        self.nodes, self.shapes, self.bn, self.torch_names = [], {}, [], {}
        self._build()

    def node(self, name, op, inputs, **attrs):
        self.nodes.append((name, op, list(inputs), attrs))
        return name

    def const(self, name, dtype, shape, data):
        return self.node(name, "Const", [], dtype=("type", dtype), value=("tensor", (dtype, shape, data)))

    def weight(self, name, *shape):
        self.shapes[name] = shape
        return self.node(name, "Const", [], dtype=("type", DT_FLOAT), value=("weight", name))

    def conv(self, scope, x, kernel, out, stride=1, pad="SAME"):
        """x is (node, channels); so is the result."""
        src, cin = x
        flt = ("type", DT_FLOAT)
        w = self.weight(scope + "/conv2d_params", *kernel, cin, out)
        c = self.node(
            scope + "/Conv2D",
            "Conv2D",
            [src, w],
            T=flt,
            strides=("ints", [1, stride, stride, 1]),
            padding=("s", pad),
            use_cudnn_on_gpu=("b", True),
        )
        bn = scope + "/batchnorm"
        self.bn.append((bn, out))
        beta, gamma, mean, var = (
            self.weight(f"{bn}/{k}", out) for k in ("beta", "gamma", "moving_mean", "moving_variance")
        )
        b = self.node(
            bn,
            "BatchNormWithGlobalNormalization",
            [c, mean, var, beta, gamma],
            T=flt,
            variance_epsilon=("f", 0.001),
            scale_after_normalization=("b", True),
        )
        d = self.checked(scope, b)
        return self.node(scope, "Relu", [d], T=flt), out

    def checked(self, scope, src):
        flt = ("type", DT_FLOAT)
        self.node(scope + "/CheckNumerics", "CheckNumerics", [src], T=flt, message=("s", "Bad numerics in " + scope))
        return self.node(scope + "/control_dependency", "Identity", [src, f"^{scope}/CheckNumerics"], T=flt)

    def pool(self, scope, x, op, k=3, stride=1, pad="SAME"):
        src, c = x
        attrs = {"ksize": ("ints", [1, k, k, 1]), "strides": ("ints", [1, stride, stride, 1]), "padding": ("s", pad)}
        if op == "AvgPool":  # MaxPool had no T attribute in 2015
            attrs["T"] = ("type", DT_FLOAT)
        return self.node(scope, op, [self.checked(scope, src)], **attrs), c

    def join(self, scope, xs):
        axis = self.const(scope + "/join/concat_dim", DT_INT32, (), 3)
        n = self.node(scope + "/join", "Concat", [axis] + [x[0] for x in xs], T=("type", DT_FLOAT), N=("i", len(xs)))
        return n, sum(x[1] for x in xs)

    def tower(self, scope, x, torch, *convs):
        """Convolutions in a row; torch names end in _1, _2, ..."""
        for i, spec in enumerate(convs):
            name = scope + "/conv" + (f"_{i}" if i else "")
            x = self.named(name, f"{torch}_{i + 1}", x, *spec)
        return x

    def named(self, scope, torch, x, *spec):
        self.torch_names[scope] = torch
        return self.conv(scope, x, *spec)

    def _build(self):
        flt = ("type", DT_FLOAT)
        self.const("DecodeJpeg/contents", DT_STRING, (), grey_jpeg())
        self.node("DecodeJpeg", "DecodeJpeg", ["DecodeJpeg/contents"], channels=("i", 3))
        self.node("Cast", "Cast", ["DecodeJpeg"], SrcT=("type", DT_UINT8), DstT=flt)
        self.const("ExpandDims/dim", DT_INT32, (), 0)
        self.node("ExpandDims", "ExpandDims", ["Cast", "ExpandDims/dim"], T=flt)
        self.const("ResizeBilinear/size", DT_INT32, (2,), [299, 299])
        # neither align_corners nor half_pixel_centers: the first form
        self.node("ResizeBilinear", "ResizeBilinear", ["ExpandDims", "ResizeBilinear/size"], T=flt)
        self.const("Sub/y", DT_FLOAT, (), 128.0)
        self.node("Sub", "Sub", ["ResizeBilinear", "Sub/y"], T=flt)
        self.const("Mul/y", DT_FLOAT, (), 0.0078125)
        x = self.node("Mul", "Mul", ["Sub", "Mul/y"], T=flt), 3

        k1, k3, k5 = (1, 1), (3, 3), (5, 5)
        half = 2, "VALID"
        x = self.named("conv", "Conv2d_1a_3x3", x, k3, 32, *half)
        x = self.named("conv_1", "Conv2d_2a_3x3", x, k3, 32, 1, "VALID")
        x = self.named("conv_2", "Conv2d_2b_3x3", x, k3, 64)
        x = self.pool("pool", x, "MaxPool", 3, *half)
        x = self.named("conv_3", "Conv2d_3b_1x1", x, k1, 80, 1, "VALID")
        x = self.named("conv_4", "Conv2d_4a_3x3", x, k3, 192, 1, "VALID")
        x = self.pool("pool_1", x, "MaxPool", 3, *half)

        def pooled(m, t, x, width, op="AvgPool"):
            p = self.pool(m + "/tower_2/pool", x, op)
            return self.named(m + "/tower_2/conv", t + "branch_pool", p, k1, width)

        for m, t, width in (("mixed", "Mixed_5b.", 32), ("mixed_1", "Mixed_5c.", 64), ("mixed_2", "Mixed_5d.", 64)):
            x = self.join(
                m,
                [
                    self.named(m + "/conv", t + "branch1x1", x, k1, 64),
                    self.tower(m + "/tower", x, t + "branch5x5", (k1, 48), (k5, 64)),
                    self.tower(m + "/tower_1", x, t + "branch3x3dbl", (k1, 64), (k3, 96), (k3, 96)),
                    pooled(m, t, x, width),
                ],
            )

        m, t = "mixed_3", "Mixed_6a."
        x = self.join(
            m,
            [
                self.named(m + "/conv", t + "branch3x3", x, k3, 384, *half),
                self.tower(m + "/tower", x, t + "branch3x3dbl", (k1, 64), (k3, 96), (k3, 96, *half)),
                self.pool(m + "/pool", x, "MaxPool", 3, *half),
            ],
        )

        wide, tall = (1, 7), (7, 1)
        for m, t, c in (
            ("mixed_4", "Mixed_6b.", 128),
            ("mixed_5", "Mixed_6c.", 160),
            ("mixed_6", "Mixed_6d.", 160),
            ("mixed_7", "Mixed_6e.", 192),
        ):
            x = self.join(
                m,
                [
                    self.named(m + "/conv", t + "branch1x1", x, k1, 192),
                    self.tower(m + "/tower", x, t + "branch7x7", (k1, c), (wide, c), (tall, 192)),
                    self.tower(
                        m + "/tower_1", x, t + "branch7x7dbl", (k1, c), (tall, c), (wide, c), (tall, c), (wide, 192)
                    ),
                    pooled(m, t, x, 192),
                ],
            )

        m, t = "mixed_8", "Mixed_7a."
        x = self.join(
            m,
            [
                self.tower(m + "/tower", x, t + "branch3x3", (k1, 192), (k3, 320, *half)),
                self.tower(m + "/tower_1", x, t + "branch7x7x3", (k1, 192), (wide, 192), (tall, 192), (k3, 192, *half)),
                self.pool(m + "/pool", x, "MaxPool", 3, *half),
            ],
        )

        for m, t, op in (("mixed_9", "Mixed_7b.", "AvgPool"), ("mixed_10", "Mixed_7c.", "MaxPool")):
            a = self.named(m + "/conv", t + "branch1x1", x, k1, 320)
            b = self.tower(m + "/tower", x, t + "branch3x3", (k1, 384))
            b = [
                self.named(m + "/tower/mixed/conv" + s, t + "branch3x3_2" + letter, b, k, 384)
                for s, letter, k in (("", "a", (1, 3)), ("_1", "b", (3, 1)))
            ]
            c = self.tower(m + "/tower_1", x, t + "branch3x3dbl", (k1, 448), (k3, 384))
            c = [
                self.named(m + "/tower_1/mixed/conv" + s, t + "branch3x3dbl_3" + letter, c, k, 384)
                for s, letter, k in (("", "a", (1, 3)), ("_1", "b", (3, 1)))
            ]
            x = self.join(m, [a, *b, *c, pooled(m, t, x, 192, op)])

        x = self.pool("pool_3", x, "AvgPool", 8, 1, "VALID")
        shape = self.const("pool_3/_reshape/shape", DT_INT32, (2,), [1, 2048])
        r = self.node("pool_3/_reshape", "Reshape", [x[0], shape], T=flt)
        w = self.weight("softmax/weights", 2048, 1008)
        b = self.weight("softmax/biases", 1008)
        no = ("b", False)
        y = self.node("softmax/logits/MatMul", "MatMul", [r, w], T=flt, transpose_a=no, transpose_b=no)
        y = self.node("softmax/logits", "BiasAdd", [y, b], T=flt)
        self.node("softmax", "Softmax", [y], T=flt)


def torch_map():
    """{TF name: name in the PyTorch port of this network}."""
    out = {}
    for scope, torch in Graph().torch_names.items():
        out[scope + "/batchnorm"] = torch + ".bn"
        out[scope + "/conv2d_params"] = torch + ".conv"
    out["softmax/weights"], out["softmax/biases"] = "fc.weight", "fc.bias"
    return out


# -------------------------------------------------------------- the weights


def random_tensor(name, shape):
    """The random part of one weight, before calibration, as float32."""
    rs = np.random.RandomState(zlib.crc32(name.encode()))

    def normal(std):
        return np.rint(rs.standard_normal(shape) * 4096.0) * (std / 4096.0)

    kind = name.rsplit("/", 1)[1]
    if kind == "conv2d_params":
        x = normal(math.sqrt(2.0 / (shape[0] * shape[1] * shape[2])))
        x *= 0.5 + rs.random_sample(shape[3])  # a scale per filter
    elif kind == "gamma":
        x = 0.6 + 0.8 * rs.random_sample(shape)
    elif kind == "beta":
        x = normal(0.35)
    elif kind == "weights":
        x = normal(0.18)
    elif kind == "biases":
        x = normal(0.1)
    else:
        raise KeyError(name)
    return x.astype(np.float32)


@functools.cache
def weights():
    """{TF node name: float32 array}, convolutions as height, width, in, out.

    With the calibration every channel has about zero mean and unit
    variance before gamma and beta on test images, the rows of the classifier
    do not see the mean feature, and its logits have a deviation of 2.5.
    """
    g = Graph()
    cal = np.load(DATA)
    out, at = {}, 0
    stats = {}
    for bn, n in g.bn:
        stats[bn + "/moving_mean"] = cal["bn_mean"][at : at + n]
        stats[bn + "/moving_variance"] = cal["bn_var"][at : at + n]
        at += n
    for name, shape in g.shapes.items():
        out[name] = stats[name] if name in stats else random_tensor(name, shape)
    w = out["softmax/weights"]
    w = (w - cal["mean_feature"][:, None] * cal["coefficients"][None]) * cal["scale"]
    out["softmax/weights"] = w
    assert at == len(cal["bn_mean"])
    assert all(a.dtype == np.float32 and a.shape == g.shapes[k] for k, a in out.items())
    return out


# ------------------------------------------------------------- the protobuf


def varint(n):
    n &= (1 << 64) - 1
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def number(field, n):
    return varint(field << 3) + varint(n)


def blob(field, data):
    data = data.encode() if isinstance(data, str) else data
    return varint(field << 3 | 2) + varint(len(data)) + data


def tensor(dtype, shape, data):
    """TensorProto: 1 dtype, 2 shape, 4 raw content, 5 float, 7 int, 8 string."""
    out = number(1, dtype)
    out += blob(2, b"".join(blob(2, number(1, n)) for n in shape))
    if isinstance(data, np.ndarray):
        return out + blob(4, data.astype("<f4").tobytes())
    if dtype == DT_FLOAT:
        return out + blob(5, struct.pack("<f", data))
    if dtype == DT_STRING:
        return out + blob(8, data)
    if shape:
        return out + blob(4, np.asarray(data, "<i4").tobytes())
    return out + blob(7, varint(data))


def attribute(kind, value):
    """AttrValue: 1 list, 2 s, 3 i, 4 f, 5 b, 6 type, 8 tensor."""
    if kind == "ints":
        return blob(1, blob(3, b"".join(map(varint, value))))
    if kind == "s":
        return blob(2, value)
    if kind == "i":
        return number(3, value)
    if kind == "f":
        return varint(4 << 3 | 5) + struct.pack("<f", value)
    if kind == "b":
        return number(5, value)
    if kind == "type":
        return number(6, value)
    return blob(8, tensor(*value))


def write_pb(path, nodes=None, values=None):
    """Writes the GraphDef; returns the sha256 of the file.  Weights that `values` lacks are left without a value."""
    nodes = Graph().nodes if nodes is None else nodes
    values = weights() if values is None else values
    digest = hashlib.sha256()
    with open(path, "wb") as f:

        def put(data):
            f.write(data)
            digest.update(data)

        for name, op, inputs, attrs in nodes:
            body = blob(1, name) + blob(2, op)
            body += b"".join(blob(3, i) for i in inputs)
            for key in sorted(attrs):
                kind, value = attrs[key]
                if kind == "weight":
                    if value not in values:
                        continue
                    a = values[value]
                    kind, value = "tensor", (DT_FLOAT, a.shape, a)
                body += blob(5, blob(1, key) + blob(2, attribute(kind, value)))
            put(blob(1, body))
        put(blob(4, number(1, 8)))  # versions.producer
    return digest.hexdigest()


def grey_jpeg():
    """The smallest plain JPEG, 8 x 8 and grey; the evaluator never reads it."""
    one_code = bytes([1] + [0] * 15 + [0])
    return b"".join(
        (
            b"\xff\xd8\xff\xdb\x00\x43\x00",
            b"\x01" * 64,
            b"\xff\xc0\x00\x0b\x08\x00\x08\x00\x08\x01\x01\x11\x00",
            b"\xff\xc4\x00\x14\x00",
            one_code,
            b"\xff\xc4\x00\x14\x10",
            one_code,
            b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\x3f\xff\xd9",
        )
    )


@functools.cache
def graph_file():
    """Path of the stand-in graph, written once a process and deleted at its end."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "standin.pb"
    assert write_pb(path) == SHA256
    return path


if __name__ == "__main__":
    target = sys.argv[1] if len(sys.argv) > 1 else "standin.pb"
    got = write_pb(target)
    print(got, target)
    if got != SHA256:
        sys.exit("not the expected bytes: " + SHA256)
