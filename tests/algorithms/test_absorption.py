"""Absorption moves what channels hardly fall below into the next bias: the function stays, a smaller range is left."""

import numpy as np
import pytest
import torch
from test_equalization import TENSOR, batches, float_of, prepared
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.algorithms.absorption import ChannelMoments
from graphq.errors import CalibrationError
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
    assert wanted.min() > 0 and np.allclose(seen.lowest().numpy(), wanted, rtol=1e-6)


@torch.no_grad()
def test_biases_move_by_the_formula_and_the_function_stays():
    model, x = high(), batches()[0]
    graph = calibrated(model, ABSORB)
    first, second = model[0].bias.detach(), model[2].bias.detach()
    scale = reads(graph, 1)[0].flatten(1).norm(dim=1) / model[0].weight.detach().flatten(1).norm(dim=1)  # of channels
    moved, taken = biases(graph)[0] / scale, biases(graph)[1]
    shift = first - moved
    assert (shift[:2] > 0.8 * first[:2]).all() and shift[2:].abs().max() < 1e-6
    weight = model[2].weight.detach().double().numpy()
    wanted = second.double().numpy() + np.einsum("oihw,i->o", weight, shift.double().numpy())
    assert np.allclose(taken.numpy(), wanted, rtol=1e-4)
    assert sqnr(model(x), float_of(graph, x)) > 50  # but for the values that do fall below
    assert "2 channels less by what they hardly fall below" in str(graphq.explain(graph))


class Chain(nn.Module):
    """Convolution, depthwise and pointwise without padding, then two linears: all but the last can give away."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 6, 1)
        )
        self.head = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5))
        for layer in (self.features[0], self.features[2], self.head[0]):
            layer.bias.data[:3] = torch.tensor([30.0, 20.0, 10.0])

    def forward(self, x):
        return self.head(self.features(x).flatten(2).transpose(1, 2))


@torch.no_grad()
def test_chains_depthwise_layers_and_linears_take_in_and_give_away():
    torch.manual_seed(0)
    model, x = Chain().eval(), batches()[0]
    graph = calibrated(model, ABSORB)
    assert str(graphq.explain(graph)).count("channels less by what they hardly fall below") == 3
    assert sqnr(model(x), float_of(graph, x)) > 50


@torch.no_grad()
def test_graphs_of_two_targets_are_shifted_alike_and_run_in_onnx_runtime(tmp_path):
    graphs = prepared(high(), ABSORB, target=["onnxruntime", "openvino"])
    calibrated = graphq.calibrate(graphs, batches(), progress=False)
    for a, b in zip(biases(calibrated["onnxruntime"]), biases(calibrated["openvino"]), strict=True):
        assert torch.equal(a, b)
    graph = graphq.convert(calibrated["onnxruntime"])
    assert graphq.verify(graph, graphq.export(graph, tmp_path / "net.onnx"), batches()[:1]).agrees


class Tokens(nn.Module):
    """Padding computes 5, what counts about 1."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
        self.first.weight.data[:] = torch.randn(8, 4) * 0.01
        self.first.weight.data[:, 0], self.first.bias.data[:] = 4.0, 1.0

    def forward(self, x, attention_mask):
        return self.second(torch.relu(self.first(x))) * attention_mask[..., None]


@torch.no_grad()
def test_padding_does_not_count():
    torch.manual_seed(0)
    mask = (torch.arange(32) < 2).long().expand(40, 32)
    x = torch.randn(40, 32, 4)
    x[..., 0] = 1 - mask
    inputs, model = {"x": x, "attention_mask": mask}, Tokens().eval()
    rule = Rule(select="linear", scheme=Scheme(weight=TENSOR, input=QuantSpec(format="uint8", symmetric=False)))
    graph = graphq.prepare(model, QuantConfig(rules=(rule,), algorithms=ABSORB), inputs, target="simulation")
    graph = graphq.calibrate(graph, [inputs], progress=False)
    assert biases(graph)[0].abs().max() < 0.2 and sqnr(model(x, mask), float_of(graph, (x, mask))) > 40


def test_data_that_say_nothing_of_a_channel_are_refused_before_anything_is_changed():
    graph = prepared(nn.Sequential(nn.Conv2d(3, 8, 1, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 3)), ABSORB)
    before = biases(graph)
    with pytest.raises(CalibrationError, match="36 values of each channel"):
        graphq.calibrate(graph, [torch.randn(1, 3, 12, 12)], progress=False)
    with pytest.raises(CalibrationError, match="not finite"):
        graphq.calibrate(graph, [torch.full((4, 3, 12, 12), torch.nan)], progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, biases(graph), strict=True))
    graphq.calibrate(graph, batches(), progress=False)


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
