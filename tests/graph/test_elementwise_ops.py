"""Element-wise integer ops give what ONNX Runtime's kernels give, code by code."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from graphq.graph.elementwise_ops import QAVG_POOL, QCAT, QLEAKY_RELU, QMUL, QSIGMOID, QSOFTMAX, QWHERE

RNG = np.random.default_rng(0)
DTYPES = {"uint8": np.uint8, "int8": np.int8}


def kernel(op, inputs, **attributes):
    """What ONNX Runtime's op gives for NumPy inputs."""
    names = [f"i{n}" for n in range(len(inputs))]
    held = [numpy_helper.from_array(np.asarray(v), n) for v, n in zip(inputs, names, strict=True)]
    node = helper.make_node(op, names, ["y"], domain="com.microsoft", **attributes)
    kind = TensorProto.UINT8 if any(np.asarray(v).dtype == np.uint8 for v in inputs) else TensorProto.INT8
    graph = helper.make_graph([node], "one", [], [helper.make_tensor_value_info("y", kind, None)], held)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {})[0]


def quantized(format, scale):
    """(scale, zero point) at random, as NumPy and as torch values."""
    limits = np.iinfo(DTYPES[format])
    s, z = np.float32(scale * RNG.uniform(0.5, 2)), DTYPES[format](RNG.integers(limits.min, limits.max + 1))
    return (s, z), (torch.tensor(s), torch.tensor(int(z), dtype=torch.int32))


def all_codes(format):
    return np.arange(256).astype(np.uint8).view(DTYPES[format])


@pytest.mark.parametrize("format", DTYPES)
@pytest.mark.parametrize("op", ["sigmoid", "leaky_relu"])
def test_functions_of_one_tensor(op, format):
    x = all_codes(format)
    for _ in range(50):
        (xs, xz), tx = quantized(format, 0.05)
        (ys, yz), ty = quantized(format, 1 / 256 if op == "sigmoid" else 0.05)
        if op == "sigmoid":
            expected = kernel("QLinearSigmoid", [x, xs, xz, ys, yz])
            ours = QSIGMOID(torch.from_numpy(x), *tx, *ty, format).numpy()
            # the runtime's logistic function is a rational one, off by 1e-5: it turns codes at ties
            assert (ours != expected).mean() < 0.01 and np.abs(ours.astype(int) - expected).max() <= 1
        else:
            expected = kernel("QLinearLeakyRelu", [x, xs, xz, ys, yz], alpha=0.1)
            ours = QLEAKY_RELU(torch.from_numpy(x), *tx, *ty, format, 0.1)
            assert np.array_equal(ours.numpy(), expected)


@pytest.mark.parametrize("format", DTYPES)
def test_products_of_all_pairs_of_codes(format):
    a, b = (v.copy() for v in np.meshgrid(all_codes(format), all_codes(format)))
    for _ in range(10):
        (As, az), ta = quantized(format, 0.02)
        (bs, bz), tb = quantized(format, 0.02)
        (ys, yz), ty = quantized(format, 0.04)
        expected = kernel("QLinearMul", [a, As, az, b, bs, bz, ys, yz])
        ours = QMUL(torch.from_numpy(a), *ta, torch.from_numpy(b), *tb, *ty, format)
        assert np.array_equal(ours.numpy(), expected)


@pytest.mark.parametrize("format", DTYPES)
def test_concatenation_takes_every_tensor_to_the_results_scale(format):
    a, b = all_codes(format).reshape(2, 128), all_codes(format)[:64].reshape(2, 32).copy()
    for _ in range(20):
        (As, az), ta = quantized(format, 0.02)
        (bs, bz), tb = quantized(format, 0.05)
        (ys, yz), ty = quantized(format, 0.04)
        expected = kernel("QLinearConcat", [ys, yz, a, As, az, b, bs, bz], axis=1)
        tensors = [torch.from_numpy(a), torch.from_numpy(b)]
        ours = QCAT(tensors, [ta[0], tb[0]], [ta[1], tb[1]], *ty, format, 1)
        assert np.array_equal(ours.numpy(), expected)


@pytest.mark.parametrize("format", DTYPES)
def test_a_choice_of_two_takes_both_to_the_results_scale(format):
    a, b = all_codes(format), all_codes(format)[::-1].copy()
    for _ in range(20):
        (As, az), ta = quantized(format, 0.02)
        (bs, bz), tb = quantized(format, 0.05)
        (ys, yz), ty = quantized(format, 0.04)
        condition = RNG.integers(0, 2, 256).astype(bool)
        expected = kernel("QLinearWhere", [condition, a, As, az, b, bs, bz, ys, yz])
        ours = QWHERE(torch.from_numpy(condition), torch.from_numpy(a), *ta, torch.from_numpy(b), *tb, *ty, format)
        assert np.array_equal(ours.numpy(), expected)


@pytest.mark.parametrize("format", DTYPES)
@pytest.mark.parametrize("length", [2, 5, 64, 77, 1000])
def test_softmax_over_the_last_axis(length, format):
    limits = np.iinfo(DTYPES[format])
    middle, spread = (limits.min + limits.max) / 2, RNG.uniform(5, 100, (400, 1))
    x = RNG.normal(middle, spread, (400, length)).clip(limits.min, limits.max).astype(DTYPES[format])
    for scale in (1 / 256, 1 / 250.6, 0.03) * 8:  # finer ones overflow in the kernel
        (xs, xz), tx = quantized(format, 0.05)
        ys, yz = np.float32(scale), DTYPES[format](limits.min)
        expected = kernel("QLinearSoftmax", [x, xs, xz, ys, yz], axis=-1, opset=13)
        ty = torch.tensor(ys), torch.tensor(int(yz), dtype=torch.int32)
        assert np.array_equal(QSOFTMAX(torch.from_numpy(x), *tx, *ty, format).numpy(), expected)


@pytest.mark.parametrize("format", DTYPES)
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(("kernel_shape", "stride", "padding"), [((3, 2), (2, 1), (1, 0)), ((2, 2), (2, 2), (0, 0)),
                                                                ((3,), (1,), (1,))])  # fmt: skip
def test_windows_are_averaged(kernel_shape, stride, padding, counted, format):
    limits = np.iinfo(DTYPES[format])
    x = RNG.integers(limits.min, limits.max + 1, (2, 5, *(9, 8)[: len(stride)])).astype(DTYPES[format])
    for _ in range(20):
        (xs, xz), tx = quantized(format, 0.05)
        (ys, yz), ty = quantized(format, 0.03)
        shape = {"kernel_shape": kernel_shape, "strides": stride, "pads": [*padding, *padding]}
        expected = kernel("QLinearAveragePool", [x, xs, xz, ys, yz], **shape, count_include_pad=int(counted))
        ours = QAVG_POOL(torch.from_numpy(x), *tx, *ty, format, kernel_shape, stride, padding, counted)
        assert np.array_equal(ours.numpy(), expected)
