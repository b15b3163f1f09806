"""Absorption moves what channels hardly fall below into the next bias: the function stays, a smaller range is left."""

import numpy as np
import pytest
import torch
from test_equalization import batches, float_of, prepared
from torch import nn

import graphq
from graphq.algorithms.absorption import ChannelMoments
from graphq.graph.decision import decision_of
from graphq.graph.view import parameter
from graphq.numerics.affine import sqnr

ABSORB = ({"name": "equalization", "args": {"absorb": True}},)


def high(second=None, between=nn.ReLU):
    """Two of the first layer's channels hardly fall below a large bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), between(), second or nn.Conv2d(8, 4, 3)).eval()
    model[0].weight.data[:2] *= 0.1
    model[0].bias.data[:2] = torch.tensor([30.0, 20.0])
    return model


def calibrated(model, algorithms):
    return graphq.calibrate(prepared(model, algorithms), batches(), progress=False)


def reads(graph, position):
    """What the layers read at this place, in the order of the graph: 1 weights, 2 biases."""
    nodes = [n for n in graph.graph.nodes if decision_of(n) is not None and decision_of(n).weight is not None]
    given = [n.args[position] if len(n.args) > position else None for n in nodes]
    sources = [n.args[0] if n is not None and n.op == "call_module" else n for n in given]
    return [parameter(graph, n) for n in sources if n is not None]


def biases(graph):
    return [b.detach() for b in reads(graph, 2)]


def test_moments_are_those_of_numpy():
    x = [torch.randn(4, 3, 5, 6) * 2 + 7 for _ in range(3)]
    seen = ChannelMoments(-3)
    for batch in x:
        seen(batch)
    every = torch.cat(x).double().numpy()
    wanted = np.maximum(0, every.mean((0, 2, 3)) - 3 * every.std((0, 2, 3)))
    assert wanted.min() > 0 and np.allclose(seen.lowest.numpy(), wanted, rtol=1e-6)


@torch.no_grad()
def test_biases_move_by_the_formula_and_the_function_stays():
    model, x = high(), batches()[0]
    plain, graph = (calibrated(model, algorithms) for algorithms in (("equalization",), ABSORB))
    (first, second), (moved, taken) = biases(plain), biases(graph)
    shift = first - moved
    assert (shift[:2] > 0.8 * first[:2]).all() and not shift[2:].any()
    weight = reads(graph, 1)[1]
    wanted = second.double().numpy() + np.einsum("oihw,i->o", weight.double().numpy(), shift.double().numpy())
    assert np.allclose(taken.numpy(), wanted, rtol=1e-5)
    assert sqnr(model(x), float_of(graph, x)) > 50  # but for the values that do fall below
    assert "2 channels less by what they hardly fall below" in str(graphq.explain(graph))


@torch.no_grad()
def test_smaller_ranges_have_finer_steps():
    model, x = high(), batches()[0]
    plain, absorbed = (sqnr(model(x), graphq.convert(calibrated(model, a))(x)) for a in (("equalization",), ABSORB))
    assert absorbed > plain + 6


def pooled():
    return nn.Sequential(nn.ReLU(), nn.AvgPool2d(2))


@pytest.mark.parametrize(
    "second, between",
    [
        (nn.Conv2d(8, 4, 3, padding=1), nn.ReLU),
        (nn.Conv2d(8, 4, 3, bias=False), nn.ReLU),
        (nn.Conv2d(8, 4, 3), nn.LeakyReLU),
        (nn.Conv2d(8, 4, 3), pooled),
    ],
)
def test_what_would_see_the_shift_is_left_alone(second, between):
    plain, graph = (biases(calibrated(high(second, between), a)) for a in (("equalization",), ABSORB))
    assert all(torch.equal(a, b) for a, b in zip(plain, graph, strict=True))
