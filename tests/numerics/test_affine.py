"""Integer quantization against NumPy in float64 and against ONNX Runtime."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from graphq.numerics.affine import (
    dequantize,
    expand,
    fake_quantize,
    quantize,
    range_of,
    sqnr,
)
from graphq.numerics.formats import FORMATS, Integer, get_format
from graphq.numerics.scales import choose_qparams

FORMAT_NAMES = [n for n, f in FORMATS.items() if isinstance(f, Integer) and f.bits <= 16]


def numpy_qparams(lo, hi, fmt, symmetric, narrow):
    qmin, qmax = fmt.limits(narrow)
    lo, hi = min(float(lo), 0.0), max(float(hi), 0.0)
    if symmetric:
        middle = 0 if fmt.signed else (qmax + 1) // 2
        scale, zero = max(-lo, hi) / (qmax - middle), middle
    else:
        scale = (hi - lo) / (qmax - qmin)
        zero = int(np.clip(np.rint(qmin - lo / scale), qmin, qmax)) if scale else max(qmin, 0)
    return np.float32(scale) if scale > 0 else np.float32(1), zero


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(FORMAT_NAMES),
    symmetric=st.booleans(),
    narrow=st.booleans(),
    lo=st.floats(-1e4, 1e4, width=32),
    hi=st.floats(-1e4, 1e4, width=32),
)
def test_qparams_and_codes_equal_the_formula_in_numpy(name, symmetric, narrow, lo, hi):
    fmt = get_format(name)
    scale, zero = choose_qparams(torch.tensor(lo), torch.tensor(hi), fmt, symmetric=symmetric, narrow_range=narrow)
    expected_scale, expected_zero = numpy_qparams(lo, hi, fmt, symmetric, narrow)
    if expected_scale >= np.finfo(np.float32).tiny:
        assert scale.item() == pytest.approx(expected_scale, rel=1e-6)
        assert zero.item() == expected_zero
    x = torch.linspace(min(lo, hi) - 1, max(lo, hi) + 1, 101)
    codes = quantize(x, scale, zero, (), fmt, narrow_range=narrow)
    exact = np.rint(x.numpy() / np.float32(scale.item())).astype(np.float64) + zero.item()
    assert np.array_equal(codes.to(torch.int64).numpy(), np.clip(exact, *fmt.limits(narrow)).astype(np.int64))


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_zero_is_exact_in_every_format(name):
    fmt = get_format(name)
    for symmetric in (True, False):
        scale, zero = choose_qparams(torch.tensor(-0.3), torch.tensor(2.0), fmt, symmetric=symmetric)
        assert fake_quantize(torch.zeros(3), scale, zero, (), fmt).tolist() == [0.0, 0.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 7), cols=st.integers(1, 13), a=st.integers(1, 5), b=st.integers(1, 5))
def test_blocks_with_ragged_ends_equal_a_loop_over_blocks(rows, cols, a, b):
    x = torch.randn(rows, cols)
    lo, hi = range_of(x, (a, b))
    for i in range(0, rows, a):
        for j in range(0, cols, b):
            part = x[i : i + a, j : j + b]
            assert lo[i // a, j // b] == part.min().clamp(max=0)
            assert hi[i // a, j // b] == part.max().clamp(min=0)
    spread = expand(lo, x.shape, (a, b)).expand_as(x)
    assert torch.equal(spread[0, :], lo[0].repeat_interleave(b)[:cols])


@pytest.mark.parametrize("block", [(), (1, -1), (-1, 1), (1, 4), (2, 3), (-1, 5)])
def test_fake_quantize_is_dequantize_of_quantize(block):
    x, fmt = torch.randn(6, 10), get_format("int4")
    scale, zero = choose_qparams(*range_of(x, block), fmt, symmetric=False)
    codes = quantize(x, scale, zero, block, fmt)
    assert torch.equal(dequantize(codes, scale, zero, block, fmt), fake_quantize(x, scale, zero, block, fmt))


def test_codes_equal_those_of_onnxruntime_at_ties_and_beyond_the_range():
    scale = np.float32(0.25)
    x = np.concatenate([np.arange(-40, 40, 0.125), [1e9, -1e9]]).astype(np.float32)
    for dtype, name, zero in ((TensorProto.UINT8, "uint8", 128), (TensorProto.INT8, "int8", -3)):
        node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
        graph = helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
            [helper.make_tensor_value_info("y", dtype, [None])],
            [
                helper.make_tensor("s", TensorProto.FLOAT, [], [scale]),
                helper.make_tensor("z", dtype, [], [zero]),
            ],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        real = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
        ours = quantize(torch.from_numpy(x), torch.tensor(scale), torch.tensor(zero), (), get_format(name))
        assert np.array_equal(real, ours.numpy())


def test_a_constant_zero_tensor_gets_scale_one_never_zero():
    for symmetric in (True, False):
        scale, zero = choose_qparams(torch.zeros(()), torch.zeros(()), get_format("uint8"), symmetric=symmetric)
        assert scale.item() == 1.0
        assert torch.equal(fake_quantize(torch.zeros(2), scale, zero, (), get_format("uint8")), torch.zeros(2))


def test_sqnr_of_a_tenth_of_the_signal_as_noise_is_twenty_db():
    x = torch.ones(1000)
    assert sqnr(x, x * 1.1) == pytest.approx(20.0, abs=1e-4)
    assert sqnr(x, x) == float("inf")
