"""Equalization keeps the function, makes both ranges of every channel one, and is worth what its paper says."""

import pytest
import torch
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.algorithms.equalization import _layers, _pairs
from graphq.errors import ConfigError
from graphq.numerics.affine import sqnr

TENSOR = QuantSpec(format="int8", granularity="tensor")
UINT8 = QuantSpec(format="uint8", symmetric=False)


class Separable(nn.Module):
    """Convolution, depthwise and pointwise, whose channels have ranges of all sizes, then two linears."""

    def __init__(self, between=nn.ReLU):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3), between(), nn.Conv2d(16, 16, 3, groups=16, padding=1), between(), nn.MaxPool2d(2),
            nn.Conv2d(16, 24, 1), between(), nn.Conv2d(24, 8, 3, groups=4),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(8, 12), between(), nn.Linear(12, 5))
        for i, j in ((0, 2), (2, 5)):
            first, second = self.features[i], self.features[j]
            scale = torch.logspace(-2, 0, 16)[torch.randperm(16)].reshape(-1, 1, 1, 1)
            first.weight.data *= scale
            first.bias.data *= scale.flatten()
            second.weight.data /= scale if j == 2 else scale.reshape(1, -1, 1, 1)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


def prepared(model, algorithms=("equalization",), weight=TENSOR, target="simulation"):
    config = QuantConfig(
        rules=(Rule(select="conv | linear", scheme=Scheme(weight=weight, input=UINT8)),), algorithms=algorithms
    )
    return graphq.prepare(model.eval(), config, (torch.randn(4, 3, 12, 12),), target=target)


def batches():
    return [torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(i)) for i in range(4)]


@torch.no_grad()
def float_of(graph, x):
    """What the graph computes with its quantizers off."""
    for _, module in graph.named_modules():
        if hasattr(module, "state"):
            module.state = "off"
    return graph(*x) if isinstance(x, tuple) else graph(x)


def test_what_lies_between_equalized_layers_is_not_compared_with_the_float_model():
    model = Separable().eval()
    graph = graphq.calibrate(prepared(model), batches(), progress=False)
    ops = graphq.compare(model, graph, batches()).ops
    between = {n.name for n in graph.graph.nodes if n.name in ("conv2d", "relu", "conv2d_1", "relu_1", "max_pool2d")}
    assert len(between) == 5 and not between & {o.node for o in ops}
    assert {"conv2d_3", "linear_1"} <= {o.node for o in ops} and min(o.sqnr for o in ops) > 15


@torch.no_grad()
def test_the_function_stays_and_both_ranges_of_a_channel_are_one():
    model = Separable()
    graph = graphq.calibrate(prepared(model), batches(), progress=False)
    layers = _layers(graph)
    pairs = _pairs(graph, layers)
    assert len(pairs) == 4  # conv → depthwise → pointwise → grouped, linear → linear
    for first, second in pairs:
        rows, weight = layers[first].weight.flatten(1).abs().amax(1), layers[second].weight
        groups = len(rows) // weight.shape[1]
        columns = weight.reshape(groups, -1, weight.shape[1], weight[0][0].numel()).abs().amax((1, 3)).flatten()
        torch.testing.assert_close(rows, columns, rtol=0.02, atol=0)
    x = batches()[0]
    torch.testing.assert_close(float_of(graph, x), model(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_scales_of_whole_tensors_gain_what_channels_of_all_sizes_have_cost():
    model, x = Separable(), batches()[0]
    results = []
    for algorithms in ((), ("equalization",)):
        graph = graphq.convert(graphq.calibrate(prepared(model, algorithms), batches(), progress=False))
        results.append(sqnr(model(x), graph(x)))
    assert results[1] > results[0] + 6


@torch.no_grad()
@pytest.mark.parametrize("size", [1e-5, 1e-3])
def test_a_channel_that_is_all_bias_does_not_outgrow_the_others(size):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    model[0].weight.data[3] *= size
    model[0].bias.data[3] = 0.5
    x, results = batches()[0], []
    for algorithms in ((), ("equalization",)):
        graph = graphq.convert(graphq.calibrate(prepared(model, algorithms), batches(), progress=False))
        results.append(sqnr(model(x), graph(x)))
    assert results[1] > results[0] - 2


def test_behind_an_algorithm_that_has_chosen_all_weights_the_error_says_so():
    with pytest.raises(ConfigError, match="equalization comes behind gptq"):
        graphq.calibrate(prepared(Separable(), ("gptq", "equalization")), batches(), progress=False)


def test_the_model_itself_is_not_changed():
    model = Separable()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graphq.calibrate(prepared(model), batches(), progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("between", [nn.ReLU6, nn.Sigmoid])
def test_ops_that_keep_no_scale_end_a_pair_and_none_is_an_error(between):
    graph = prepared(Separable(between))
    with pytest.raises(ConfigError, match="no two layers follow"):
        graphq.calibrate(graph, batches(), progress=False)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = torch.relu(self.first(x))
        return self.second(y) + y


def test_a_tensor_that_others_read_too_keeps_its_scale():
    with pytest.raises(ConfigError, match="no two layers follow"):
        graphq.calibrate(prepared(Residual()), batches(), progress=False)


@torch.no_grad()
def test_it_goes_before_gptq_is_saved_and_runs_in_onnx_runtime(tmp_path):
    model, channels = Separable(), QuantSpec(format="int8", granularity="channel")
    graph = prepared(model, ("equalization", "gptq"), channels, target="onnxruntime")
    calibrated = graphq.calibrate(graph, batches(), progress=False)
    graphq.save(calibrated, tmp_path / "saved")
    again = graphq.convert(graphq.load(tmp_path / "saved", model))
    quantized, x = graphq.convert(calibrated), batches()[0]
    assert torch.equal(again(x), quantized(x))
    path = graphq.export(quantized, tmp_path / "net.onnx")
    assert graphq.verify(quantized, path, batches()[:1]).agrees
