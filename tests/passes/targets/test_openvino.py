"""OpenVINO runs the exported file in int8, as explain predicts, and gives what was simulated."""

import pytest
import torch
from torch import nn

import graphq
from graphq.passes.targets.onnxruntime import saturates_here


def layer(module, *shape):
    """A layer with large weights, and inputs that are large too: an unguarded pair would leave int16."""
    torch.manual_seed(0)
    with torch.no_grad():
        module.weight.mul_(4).add_(module.weight.abs().mean())
    return module.eval(), [torch.rand(2, *shape) for _ in range(3)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: layer(nn.Conv2d(3, 8, 3, padding=1), 3, 9, 9),
        lambda: layer(nn.Conv2d(16, 8, 1), 16, 9, 9),
        lambda: layer(nn.Conv2d(8, 8, 3, groups=8, stride=2), 8, 9, 9),
        lambda: layer(nn.Linear(37, 8), 37),
        lambda: layer(nn.Linear(32, 8), 5, 32),
    ],
    ids=["odd channels", "pointwise", "depthwise", "linear", "linear of three dimensions"],
)
def test_a_layer_is_an_integer_layer_and_gives_what_was_simulated(make, tmp_path):
    model, data = make()
    quantized = graphq.quantize(model, "int8", data, target="openvino", progress=False)
    path = graphq.export(quantized, tmp_path / "m.onnx")
    explanation = graphq.explain(quantized, path)
    assert not explanation.disagreements
    assert set(explanation.kernels()) & {"Convolution", "FullyConnected"}
    result = graphq.verify(quantized, path, data)
    assert result.agrees and result.executed_sqnr > 100


def test_sums_of_residual_blocks_are_computed_in_the_convolution(tmp_path):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))

        def forward(self, x):
            x = torch.relu(self.a(x))
            x = torch.relu(self.c(torch.relu(self.b(x))) + x)
            return self.d(self.d(x) + x)

    torch.manual_seed(0)
    data = [torch.randn(2, 8, 9, 9) for _ in range(2)]
    quantized = graphq.quantize(Residual().eval(), "int8", data, target="openvino", progress=False)
    path = graphq.export(quantized, tmp_path / "m.onnx")
    in_place, own_input = (r for r in graphq.explain(quantized, path).rows if r.op.startswith("add"))
    assert in_place.predicted == in_place.found == "Convolution"
    assert own_input.action == "float" and own_input.reason == "the residual branch is what the convolution reads"


@pytest.mark.skipif(not saturates_here(), reason="this CPU adds in int32")
def test_the_guard_is_needed_here(tmp_path):
    model, data = layer(nn.Conv2d(16, 8, 1), 16, 9, 9)
    with torch.no_grad():
        model.weight.abs_()
    for cpu, exact in (("avx2", True), ("vnni", False)):
        place = graphq.get_target("openvino", cpu=cpu)
        quantized = graphq.quantize(model, "int8", data, target=place, progress=False)
        path = graphq.export(quantized, tmp_path / "m.onnx")
        assert (graphq.verify(quantized, path, data).executed_sqnr > 100) is exact
