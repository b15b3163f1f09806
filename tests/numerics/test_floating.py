"""Small floats bit for bit: against ml_dtypes, torch's own casts, and a table of all codes."""

import ml_dtypes
import numpy as np
import pytest
import torch

from graphq.numerics.affine import dequantize, quantize
from graphq.numerics.floating import decode, encode, magnitudes, round_to_grid_
from graphq.numerics.formats import FORMATS, Floating

FLOATS = {n: f for n, f in FORMATS.items() if isinstance(f, Floating)}
PEERS = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}
LARGEST = {
    "float16": 65504, "bfloat16": 3.3895313892515355e38, "fp8_e4m3": 448, "fp8_e5m2": 57344, "fp6_e3m2": 28,
    "fp6_e2m3": 7.5, "fp4_e2m1": 6,
}  # fmt: skip
SPECIAL = [
    0.0,
    -0.0,
    float("inf"),
    -float("inf"),
    float("nan"),
    1e-45,
    -1e-45,
    1.17549435e-38,
    3.4028234e38,
    -3.4028234e38,
]


def values(fmt, count=100_000):
    """Random values over the whole range and beyond, all codes, all midpoints, their float32 neighbours, specials."""
    torch.manual_seed(0)
    low, high = fmt.smallest_exponent - fmt.fraction - 3, min(fmt.largest_exponent + 2, 127)
    spread = torch.randn(count) * torch.exp2(torch.randint(low, high, (count,)).float())
    peer = PEERS[fmt.name]
    bits = np.arange(1 << fmt.bits, dtype=np.uint16 if fmt.bits == 16 else np.uint8)
    codes = torch.from_numpy(bits.view(peer).astype(np.float32))
    finite = codes[codes.isfinite()].double().unique()
    middles = ((finite[1:] + finite[:-1]) / 2).float()
    around = [torch.nextafter(middles, torch.full_like(middles, side)) for side in (-3.4e38, 3.4e38)]
    return torch.cat([spread, codes, middles, *around, torch.tensor(SPECIAL)])


@pytest.mark.parametrize("name", FLOATS)
def test_largest_value_is_that_of_the_specification(name):
    assert FLOATS[name].largest == LARGEST[name]


@pytest.mark.parametrize("name", FLOATS)
def test_rounding_equals_ml_dtypes_and_saturates(name):
    fmt, x = FLOATS[name], values(FLOATS[name])
    within = x.clamp(-fmt.largest, fmt.largest)
    theirs = within.numpy().astype(PEERS[name]).astype(np.float32)
    ours = round_to_grid_(x.clone(), fmt)
    assert torch.equal(ours.isnan(), x.isnan())  # in simulation also of formats that have no NaN
    np.testing.assert_array_equal(ours[~x.isnan()].numpy(), theirs[~x.isnan().numpy()])


@pytest.mark.parametrize("name", [n for n, f in FLOATS.items() if f.beyond])
def test_without_saturation_it_is_the_cast_of_torch(name):
    fmt, x = FLOATS[name], values(FLOATS[name])
    theirs = torch.from_numpy(x.numpy().astype(PEERS[name]).astype(np.float32))
    ours = round_to_grid_(x.clone(), fmt, saturate=False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    if name != "fp8_e4m3":  # torch's own cast saturates there
        torch.testing.assert_close(ours, x.to(fmt.storage).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", FLOATS)
def test_codes_are_the_bit_patterns_of_ml_dtypes(name):
    fmt, x = FLOATS[name], values(FLOATS[name])
    x = x[~x.isnan()].clamp(-fmt.largest, fmt.largest)
    one, zero = torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
    codes = quantize(x, one, zero, (), fmt)
    theirs = x.numpy().astype(PEERS[name])
    bits = codes if codes.dtype == torch.uint8 else codes.view(torch.uint16 if fmt.bits == 16 else torch.uint8)
    mask = (1 << fmt.bits) - 1  # ml_dtypes leaves the bits above as they are
    np.testing.assert_array_equal(bits.numpy(), theirs.view(np.uint16 if fmt.bits == 16 else np.uint8) & mask)
    np.testing.assert_array_equal(dequantize(codes, one, zero, (), fmt).numpy(), theirs.astype(np.float32))


@pytest.mark.parametrize("name", ["fp6_e3m2", "fp6_e2m3", "fp4_e2m1"])
def test_every_code_survives_decode_and_encode(name):
    fmt = FLOATS[name]
    codes = torch.arange(1 << fmt.bits, dtype=torch.uint8)
    assert torch.equal(encode(decode(codes, fmt), fmt), codes)


def test_the_values_of_fp4_are_those_of_the_specification():
    assert magnitudes(FLOATS["fp4_e2m1"]).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert magnitudes(FLOATS["fp6_e2m3"])[:9].tolist() == [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("rounding", ["half_even", "half_away", "floor"])
def test_each_way_of_rounding_equals_a_search_in_the_table(name, rounding):
    fmt = FLOATS[name]
    torch.manual_seed(1)
    limit = min(fmt.largest, 1e30)
    x = torch.cat([torch.randn(3000) * limit / 4, torch.randn(3000), torch.randn(1000) * 2.0**fmt.smallest_exponent])
    x = x.clamp(-limit, limit)
    bits = np.arange(1 << fmt.bits, dtype=np.uint16 if fmt.bits == 16 else np.uint8)
    table = np.unique(bits.view(PEERS[name]).astype(np.float64))
    table = table[np.isfinite(table)]
    if fmt.bits < 16:
        x = torch.cat([x, torch.from_numpy(((table[1:] + table[:-1]) / 2).astype(np.float32))])
    v = x.double().numpy()
    below = table[np.searchsorted(table, v, side="right") - 1]
    above = table[np.clip(np.searchsorted(table, v, side="left"), 0, len(table) - 1)]
    if rounding == "floor":
        wanted = below
    else:
        nearer = np.where(v - below < above - v, below, above)
        away = np.where(np.abs(below) > np.abs(above), below, above)
        even = np.where(np.searchsorted(table, below) % 2 == np.searchsorted(table, 0.0) % 2, below, above)
        tie = even if rounding == "half_even" else away
        wanted = np.where(v - below == above - v, tie, nearer)
    np.testing.assert_array_equal(round_to_grid_(x.clone(), fmt, rounding).double().numpy(), wanted)


def test_stochastic_rounding_is_right_on_average():
    torch.manual_seed(0)
    x = torch.full((200_000,), 1.2)
    rounded = round_to_grid_(x.clone(), FLOATS["fp4_e2m1"], "stochastic")
    assert set(rounded.tolist()) == {1.0, 1.5}
    assert rounded.mean().item() == pytest.approx(1.2, abs=0.005)
