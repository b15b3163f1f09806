"""No input can saturate a guarded weight, and the guard gives away as little as it must."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphq
from graphq.numerics.affine import sqnr
from graphq.numerics.pairs import along_k, from_k
from graphq.passes.placement.saturation_guard import clip_pairs, guard_rows


def worst_pair(codes):
    """The largest magnitude that any u8 activations can give to a pair of products."""
    pairs = torch.nn.functional.pad(codes, [0, codes.shape[1] % 2]).unflatten(1, (-1, 2))
    return 255 * max(pairs.clamp(min=0).sum(-1).max().item(), (-pairs).clamp(min=0).sum(-1).max().item())


@settings(max_examples=40, deadline=None)
@given(out=st.integers(1, 6), k=st.integers(1, 33), seed=st.integers(0, 99), heavy=st.booleans())
def test_no_pair_can_leave_int16(out, k, seed, heavy):
    torch.manual_seed(seed)
    rows = torch.randn(out, k) if not heavy else torch.rand(out, k) + 0.9
    values, scale = guard_rows(rows, rows.abs().amax(1).clamp(min=1e-6) / 127)
    codes = torch.round(values / scale[:, None])
    assert torch.allclose(codes * scale[:, None], values, atol=1e-6)
    assert worst_pair(codes) <= 2**15 - 1


@settings(max_examples=40, deadline=None)
@given(out=st.integers(1, 6), k=st.integers(1, 33), seed=st.integers(0, 99))
def test_no_pair_can_leave_int16_as_far_as_its_inputs_reach(out, k, seed):
    torch.manual_seed(seed)
    rows, reach = torch.rand(out, k) + 0.9, torch.rand(out, k) * 0.75 + 0.25
    values, scale = guard_rows(rows, rows.abs().amax(1) / 127, reach)
    codes = torch.round(values / scale[:, None])
    assert worst_pair(codes * reach) <= 2**15 - 1 + 1e-2
    assert codes.abs().max() <= 127


def test_safe_weights_are_only_rounded():
    rows = torch.randn(4, 16)
    rows[:, 1::2] = 0
    scale = rows.abs().amax(1) / 127
    values, guarded = guard_rows(rows, scale)
    assert torch.equal(guarded, scale)
    assert torch.equal(values, torch.round(rows / scale[:, None]) * scale[:, None])


def test_the_guard_loses_less_than_a_bit_everywhere():
    rows = torch.randn(64, 256)
    scale = rows.abs().amax(1) / 127
    values, _ = guard_rows(rows, scale)
    seven_bits = torch.round(rows / (2 * scale[:, None])) * 2 * scale[:, None]
    assert sqnr(rows, values) > sqnr(rows, seven_bits) + 2


def test_clipping_shares_the_excess():
    codes = torch.tensor([[127.0, 127.0, -100.0, -100.0, 120.0, -120.0]])
    assert clip_pairs(codes, torch.ones(1, 6)).tolist() == [[64.0, 64.0, -64.0, -64.0, 120.0, -120.0]]
    halves = torch.tensor([[0.5, 0.5, 1.0, 0.5, 1.0, 1.0]])
    assert clip_pairs(codes, halves).tolist() == [[127.0, 127.0, -82.0, -92.0, 120.0, -120.0]]


def test_k_runs_over_positions_then_channels():
    weight = torch.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    rows = along_k(weight)
    assert rows[0].tolist()[:4] == [weight[0, 0, 0, 0], weight[0, 1, 0, 0], weight[0, 2, 0, 0], weight[0, 0, 0, 1]]
    assert torch.equal(from_k(rows, weight.shape), weight)


def test_the_guard_runs_for_avx2_only_and_spares_depthwise_convolutions():
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    x = torch.randn(4, 4, 8, 8)
    reasons = {}
    for cpu in ("avx2", "vnni", "arm"):
        gm = graphq.quantize(net, "int8", [x], target=graphq.get_target("onnxruntime", cpu=cpu), progress=False)
        reasons[cpu] = ["int16" in r.reason for r in graphq.explain(gm).rows if r.action == "quantize"]
    assert reasons == {"avx2": [True, False], "vnni": [False, False], "arm": [False, False]}


class Quiet(nn.Module):
    """A convolution in groups and a linear whose inputs, but for one channel, stay far below the top of their scale."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(8, 4, 3, padding=1, groups=2), nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(torch.relu(self.conv(x)).mean((2, 3)))


def guarded(guard, data):
    torch.manual_seed(0)
    place = graphq.get_target("onnxruntime", cpu="avx2", guard=guard)
    return graphq.quantize(Quiet().eval(), "int8", data, target=place, progress=False), place


def test_by_the_data_the_guard_gives_away_less_and_still_nothing_saturates():
    loud = torch.tensor([4.0, 1, 1, 1, 1, 1, 1, 1])[:, None, None]
    data = [torch.rand(4, 8, 5, 5) * loud for _ in range(4)]
    (strict, _), (by_data, place) = guarded(True, data), guarded("calibrated", data)
    exact = graphq.get_target("onnxruntime", cpu="vnni").reference
    x = data[0] * 1.25
    assert torch.equal(place.reference(by_data)(x), exact(by_data)(x))
    torch.manual_seed(0)
    want = Quiet().eval()(data[0])
    assert sqnr(want, by_data(data[0])) > sqnr(want, strict(data[0]))
