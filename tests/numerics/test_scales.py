"""Scales of block formats against their definitions, written out value by value in NumPy float64."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from graphq.errors import ConfigError
from graphq.numerics.affine import dequantize, fake_quantize, quantize, range_of
from graphq.numerics.formats import BLOCK_FORMATS, FORMATS
from graphq.numerics.scales import choose_qparams, shared_exponent, units

ELEMENTS = {  # name → (dtype of ml_dtypes or None for int8, exponent of the largest value)
    "mxfp8_e4m3": (ml_dtypes.float8_e4m3fn, 8),
    "mxfp8_e5m2": (ml_dtypes.float8_e5m2, 15),
    "mxfp6_e3m2": (ml_dtypes.float6_e3m2fn, 4),
    "mxfp6_e2m3": (ml_dtypes.float6_e2m3fn, 2),
    "mxfp4": (ml_dtypes.float4_e2m1fn, 2),
    "mxint8": (None, 0),
}
LARGEST = {"mxfp8_e4m3": 448, "mxfp8_e5m2": 57344, "mxfp6_e3m2": 28, "mxfp6_e2m3": 7.5, "mxfp4": 6}


def sample(rows, group, seed=0):
    """Values of many magnitudes; some blocks are zero, tiny, or have their largest value next to a power of two."""
    torch.manual_seed(seed)
    x = torch.randn(rows, group) * torch.exp2(torch.randint(-30, 30, (rows, 1)).float())
    x[0], x[1], x[2] = 0.0, 1e-40, 0.0
    x[2, 0] = math.nextafter(8.0, 0.0)
    x[3, 0] = x[3].abs().max() * 64
    x[4] = torch.exp2(torch.randint(-3, 3, (group,)).float())
    return x


def fake(x, name, mode="even"):
    spec = BLOCK_FORMATS[name]
    fmt, narrow = FORMATS[spec["format"]], spec.get("narrow_range", False)
    block = (1, spec["group_size"])
    scale, zero = choose_qparams(
        *range_of(x, block), fmt, symmetric=True, narrow_range=narrow, scale=spec["scale"],
        mode=spec.get("scale_mode", mode),
    )  # fmt: skip
    result = fake_quantize(x, scale, zero, block, fmt, narrow_range=narrow)
    codes = quantize(x, scale, zero, block, fmt, narrow_range=narrow)
    assert torch.equal(dequantize(codes, scale, zero, block, fmt), result)
    return result, scale


def exponent_of(amax, name, mode):
    """OCP Microscaling v1.0, 6.3, and its two variants; the sizes of the exponent are those of E8M0."""
    _, largest = ELEMENTS[name]
    fraction = {"mxfp8_e4m3": 3, "mxfp8_e5m2": 2, "mxfp6_e3m2": 2, "mxfp6_e2m3": 3, "mxfp4": 1, "mxint8": 6}[name]
    if mode == "even":  # as the float32 bits: add half a unit of the element's mantissa, keep the exponent
        bits = np.float32(amax).view(np.uint32) + np.uint32(1 << (23 - fraction - 1))
        e = int(bits >> 23) - 127
    elif mode == "cover":
        return min(max(math.ceil(math.log2(amax / {**LARGEST, "mxint8": 127 / 64}[name])), -127), 127)
    else:
        e = (math.floor if mode == "floor" else math.ceil)(math.log2(amax))
    return min(max(e - largest, -127), 127)


@pytest.mark.parametrize("mode", ["floor", "ceil", "even", "cover"])
@pytest.mark.parametrize("name", ELEMENTS)
def test_microscaling_formats_equal_the_definition_value_by_value(name, mode):
    x = sample(3200, 32)
    ours, _ = fake(x, name, mode)
    dtype, _ = ELEMENTS[name]
    for row, result in zip(x.numpy(), ours.numpy(), strict=True):
        amax = np.abs(row).max()
        if amax < np.finfo(np.float32).tiny:
            assert not result.any() or amax > 0
            continue
        scale = 2.0 ** exponent_of(float(amax), name, mode)
        v = row.astype(np.float64) / scale
        if dtype is None:
            wanted = np.clip(np.rint(v * 64), -127, 127) / 64 * scale
        else:
            limit = LARGEST[name]
            wanted = np.clip(v, -limit, limit).astype(np.float32).astype(dtype).astype(np.float64) * scale
        np.testing.assert_array_equal(result.astype(np.float64), wanted)


def test_e8m0_scales_stay_within_their_exponents():
    fmt = FORMATS["fp4_e2m1"]
    assert shared_exponent(torch.tensor(1e-44, dtype=torch.float64), fmt, "floor").item() == 2.0**-127
    assert shared_exponent(torch.tensor(3e38, dtype=torch.float64), fmt, "floor").item() == 2.0**125


def test_nvfp4_equals_the_two_level_definition():
    x = sample(6400, 16)
    x[5] = 0.0
    x = x.clamp(-1e6, 1e6)
    ours, _ = fake(x, "nvfp4")
    unit = np.float32(448 * 6 / np.float64(x.abs().max()))
    for row, result in zip(x.numpy(), ours.numpy(), strict=True):
        ideal = np.float32(np.float64(np.abs(row).max()) / 6 * np.float64(unit))
        block = np.float32(ideal.astype(ml_dtypes.float8_e4m3fn)) or np.float32(0.125)
        scale = np.float32(np.float32(block) / unit)
        v = np.clip(row / scale, -6, 6) if row.any() else row
        wanted = v.astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale
        np.testing.assert_array_equal(result, wanted)
    assert units(torch.tensor(2.0), FORMATS["fp4_e2m1"]).item() == 448 * 3


def e5m3(value):
    """The nearest of all values of an unsigned float of 5 exponent and 3 mantissa bits, ties to even codes."""
    codes = [m / 8 * 2.0**-14 for m in range(8)]
    codes += [(1 + m / 8) * 2.0**e for e in range(-14, 17) for m in range(8)][:-1]  # the last stands for NaN
    below = max(i for i, c in enumerate(codes) if c <= value)
    if below == len(codes) - 1:
        return codes[-1]
    low, high = codes[below], codes[below + 1]
    return low if value - low < high - value or (value - low == high - value and below % 2 == 0) else high


@pytest.mark.parametrize("kind", ["e5m3", "e5m3_global"])
def test_scales_in_e5m3_equal_the_definition(kind):
    x = sample(6400, 16).clamp(-1e6, 1e6)
    x[5] = 0.0
    x[6] = 1e-7
    amax = x.abs().amax(1)
    ours, _ = choose_qparams(-amax, amax, FORMATS["fp4_e2m1"], symmetric=True, scale=kind)
    unit = float(np.float32(114688 * 6 / np.float64(amax.max()))) if kind == "e5m3_global" else 1.0
    for largest, scale in zip(amax.double().tolist(), ours.tolist(), strict=True):
        wanted = (e5m3(float(np.float32(largest / 6 * unit))) or 2.0**-17) / unit if largest else 1.0
        assert scale == np.float32(wanted)


@pytest.mark.parametrize(("name", "magnitude"), [("mx6", 4), ("mx9", 7)])
def test_shared_microexponents_equal_the_definition_value_by_value(name, magnitude):
    x = sample(6400, 16)
    ours, _ = fake(x, name)
    for row, result in zip(x.numpy(), ours.numpy(), strict=True):
        amax = np.abs(row).max()
        if amax < np.finfo(np.float32).tiny:
            assert not np.abs(result).max() > amax * 2
            continue
        e = math.floor(math.log2(amax))
        for i in range(0, 16, 2):
            pair = row[i : i + 2].astype(np.float64)
            shift = all(p == 0 or math.floor(math.log2(abs(p))) <= e - 1 for p in pair)
            step = 2.0 ** ((e - shift) - (magnitude + 1) + 2)
            wanted = np.clip(np.rint(pair / step), -(2**magnitude - 1), 2**magnitude - 1) * step
            np.testing.assert_array_equal(result[i : i + 2].astype(np.float64), wanted)


def test_bfp16_doubles_the_step_where_a_code_would_overflow():
    x = sample(12_800, 8)
    ours, _ = fake(x, "bfp16")
    doubled = 0
    for row, result in zip(x.numpy(), ours.numpy(), strict=True):
        amax = float(np.abs(row).max())
        if amax < np.finfo(np.float32).tiny:
            continue
        step = 2.0 ** (math.floor(math.log2(amax)) - 6)
        codes = np.rint(row.astype(np.float64) / step)
        if codes.max() > 127 or codes.min() < -128:
            step, doubled = 2 * step, doubled + 1
        wanted = np.clip(np.rint(row.astype(np.float64) / step), -128, 127) * step
        np.testing.assert_array_equal(result.astype(np.float64), wanted)
    assert doubled


@pytest.mark.parametrize(("lo", "hi"), [(-1.3, 2.0), (0.0, 6.0), (-5.0, 0.1), (-1e-3, 7e-4)])
def test_power_of_two_scales_follow_the_rule_of_their_source(lo, hi):
    for name, symmetric in (("int8", True), ("uint8", False), ("int8", False)):
        fmt = FORMATS[name]
        scale, zero = choose_qparams(torch.tensor(lo), torch.tensor(hi), fmt, symmetric=symmetric, scale="pof2")
        lo32, hi32 = float(np.float32(lo)), float(np.float32(hi))
        s = (2 * max(-lo32, hi32) if symmetric else hi32 - lo32) / (fmt.qmax - fmt.qmin)
        assert scale.item() == 2.0 ** -round(-math.log2(s))
        assert zero.item() == (0 if symmetric else max(fmt.qmin, int(fmt.qmin - lo32 / s)))


def test_the_full_span_divides_by_half_of_all_codes():
    lo, hi = torch.tensor(-3.0), torch.tensor(1.0)
    for name, divisor in (("int8", 127.5), ("int4", 7.5), ("fp8_e4m3", 448), ("fp4_e2m1", 6)):
        scale, _ = choose_qparams(lo, hi, FORMATS[name], symmetric=True, span="full")
        assert scale.item() == pytest.approx(3 / divisor, rel=1e-7)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_a_ragged_last_block_is_as_if_zeros_followed(name):
    if name in ("mx6", "mx9"):
        with pytest.raises(ConfigError, match="pairs"):
            fake(torch.randn(4, 21), name)
        return
    group = BLOCK_FORMATS[name]["group_size"]
    x = torch.randn(4, 2 * group + 5)
    padded = torch.nn.functional.pad(x, [0, group - 5])
    assert torch.equal(fake(x, name)[0], fake(padded, name)[0][:, : x.shape[1]])


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_nan_stays_in_its_place(name):
    group = BLOCK_FORMATS[name]["group_size"]
    fmt = FORMATS[BLOCK_FORMATS[name]["format"]]
    x = torch.randn(2, group)
    lo, hi = range_of(x, (1, group))
    scale, zero = choose_qparams(lo, hi, fmt, symmetric=True, scale=BLOCK_FORMATS[name]["scale"])
    x[1, 3] = float("nan")
    result = fake_quantize(x, scale, zero, (1, group), fmt)
    assert torch.equal(result.isnan(), x.isnan())
