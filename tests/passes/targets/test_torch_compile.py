"""torch.compile makes int8 kernels of the exported program, as explain predicts, and gives what was simulated."""

import pytest
import torch
from torch import nn

import graphq
from graphq.errors import ExportError, RuntimeMismatch, TargetError
from graphq.evaluate.inductor import load_program


class Shared(nn.Module):
    """Two layers read one quantized tensor: each must have a dequantize of its own. Kernels without bias take in the
    sum that follows: the second operand is not theirs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.a, self.b = nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Conv2d(8, 8, 1)
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.up, self.down = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)

    def forward(self, x):
        x = torch.relu(self.stem(torch.nn.functional.pad(x, (0, 1, 0, 1))))
        y = (torch.nn.functional.relu6(self.a(x)) + self.b(x)).mean((2, 3))
        y = y + self.down(torch.nn.functional.silu(self.up(y)))
        return self.head(torch.nn.functional.gelu(self.hidden(y)))


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    torch.manual_seed(0)
    model = Shared().eval()
    data = [torch.randn(2, 3, 9, 9) for _ in range(3)]
    quantized = graphq.quantize(model, "int8", data, target="torch_compile", progress=False)
    return quantized, graphq.export(quantized, tmp_path_factory.mktemp("p") / "model.pt2"), data


def test_every_convolution_and_linear_is_the_predicted_int8_kernel(program):
    quantized, path, _ = program
    explanation = graphq.explain(quantized, path)
    layers = [r for r in explanation.rows if r.op in ("conv2d", "linear")]
    assert {r.node: r.found for r in layers} == {r.node: r.predicted for r in layers} and len(layers) == 7
    assert not explanation.disagreements and not explanation.undecided


def test_the_program_gives_what_was_simulated_as_it_is_written_and_compiled(program):
    quantized, path, data = program
    result = graphq.verify(quantized, path, data)
    assert result.agrees and result.output_sqnr == float("inf") and result.executed_sqnr > 60


def test_the_program_needs_nothing_of_graphq(program):
    _, path, data = program
    loaded = load_program(path)
    assert not any("graphq" in str(n.target) for n in loaded.graph.nodes if n.op == "call_function")
    assert loaded.module()(torch.cat(data)).shape == (6, 4)


def test_other_names_and_scales_are_refused(program, tmp_path):
    quantized, _, _ = program
    with pytest.raises(ExportError, match=r"does not end in \.pt2"):
        graphq.export(quantized, tmp_path / "model.onnx")
    (tmp_path / "broken.pt2").write_bytes(b"no program")
    with pytest.raises(RuntimeMismatch, match="not a program"):
        load_program(tmp_path / "broken.pt2")
    weight = graphq.QuantSpec(format="int8", granularity="group", group_size=4)
    config = graphq.QuantConfig(rules=(graphq.Rule(select="linear", scheme=graphq.Scheme(weight=weight)),))
    data = [torch.randn(2, 8)]
    with pytest.raises(TargetError, match="scale per block"):
        graphq.export(
            graphq.quantize(nn.Linear(8, 4), config, data, target="torch_compile", progress=False), tmp_path / "m.pt2"
        )


def test_one_calibration_gives_a_program_and_a_model(tmp_path):
    data = [torch.randn(2, 3, 9, 9) for _ in range(2)]
    both = graphq.quantize(Shared().eval(), "int8", data, target=["onnxruntime", "torch_compile"], progress=False)
    files = graphq.export(both, tmp_path / "model.onnx")
    assert {p.name for p in files.values()} == {"model.onnxruntime.onnx", "model.torch_compile.pt2"}
