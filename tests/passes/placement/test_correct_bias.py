"""Bias correction takes the mean error of rounded weights off the bias."""

import pytest
import torch
from torch import nn

import graphq
from graphq import QuantConfig, Rule, Scheme
from graphq.config.presets import ACTIVATION_UINT8, CONFIGS
from graphq.graph.decision import decision_of
from graphq.graph.view import parameter

COARSE = graphq.QuantSpec(format="int4", symmetric=True, granularity="channel", narrow_range=True)
LAYERS = {
    "pointwise": (nn.Conv2d(8, 6, 1), (4, 8, 5, 5)),
    "grouped": (nn.Conv2d(8, 6, 1, groups=2), (4, 8, 5, 5)),
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8), (4, 8, 9, 9)),
    "linear": (nn.Linear(8, 6), (16, 8)),
    "linear of rank 3": (nn.Linear(8, 6), (4, 5, 8)),
}


def calibrated(layer, x, correct):
    rule = Rule(select="*", scheme=Scheme(weight=COARSE, input=ACTIVATION_UINT8))
    config = QuantConfig(rules=(rule,), bias_correction=correct)
    gm = graphq.prepare(layer, config, (x,), target=graphq.get_target("onnxruntime", cpu="vnni"))
    return graphq.calibrate(gm, [x], progress=False)


@pytest.mark.parametrize("name", LAYERS)
def test_the_mean_output_of_every_channel_is_that_of_the_float_layer(name):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    x = torch.rand(shape).mul(2).sub(0.2)
    plain = (calibrated(layer, x, False)(x) - layer(x)).detach()
    corrected = (calibrated(layer, x, True)(x) - layer(x)).detach()
    dims = [d for d in range(x.ndim) if d != (1 if x.ndim == 4 else x.ndim - 1)]
    # what is left of the mean is the rounding of the input, and windows that see less of the border than the mean does
    assert corrected.mean(dims).abs().max() < 0.2 * plain.mean(dims).abs().max()
    assert corrected.square().mean() < plain.square().mean()


def test_the_shift_is_the_product_of_weight_error_and_mean_input():
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 6), torch.rand(32, 8)
    gm = calibrated(layer, x, True)
    op = next(n for n in gm.graph.nodes if decision_of(n))
    decision = decision_of(op)
    rounded = gm.get_submodule(f"quantizers.{decision.weight.name}")(layer.weight).double()
    wanted = layer.bias.double() - (rounded - layer.weight.double()) @ x.double().mean(0)
    torch.testing.assert_close(parameter(gm, decision.bias).double(), wanted, rtol=0, atol=1e-6)
    assert "bias corrected" in decision.reason


def test_layers_that_share_a_bias_get_one_each():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.bias = self.a.bias

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    gm = calibrated(Shared(), torch.rand(32, 8), True)
    biases = {decision_of(n).bias.target for n in gm.graph.nodes if decision_of(n) and decision_of(n).bias is not None}
    assert len(biases) == 2


@pytest.mark.parametrize("width", [8, 10])
def test_a_convolution_and_a_linear_that_read_one_tensor_have_means_of_their_own_axes(width):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.linear = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Linear(width, 4)

        def forward(self, x):
            h = torch.relu(self.stem(x))
            return self.conv(h), self.linear(h)

    torch.manual_seed(0)
    x = torch.rand(4, 3, 6, width)
    errors = {}
    model = Both().eval()
    with torch.no_grad():
        for correct in (False, True):
            outputs = calibrated(model, x, correct)(x)
            pairs = zip(outputs, model(x), ((0, 2, 3), (0, 1, 2)), strict=True)
            errors[correct] = [(a - b).mean(axes).abs().max() for a, b, axes in pairs]
    assert all(after < before / 3 for before, after in zip(errors[False], errors[True], strict=True))


def test_the_graph_has_no_watchers_left_and_the_model_keeps_its_bias():
    layer = nn.Linear(8, 6)
    before = layer.bias.detach().clone()
    gm = calibrated(layer, torch.rand(32, 8), True)
    assert not any("_watchers" in str(n.target) for n in gm.graph.nodes)
    assert torch.equal(layer.bias, before)


def test_the_int8_preset_corrects_and_weight_only_has_nothing_to_correct_with():
    assert CONFIGS["int8"].bias_correction and not CONFIGS["int8_weight_only"].bias_correction
