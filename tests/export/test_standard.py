"""Files in the formats of the ONNX standard mean, bit for bit, what was simulated: onnx.reference and ONNX Runtime."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.errors import ExportError, TargetError
from graphq.graph.ops import DEQUANTIZE, QUANTIZE

FP8 = QuantSpec(format="fp8_e4m3")
GROUP = {"granularity": "group", "group_size": 16}
CASES = {  # name → weight, input, opset, type of the weight's codes
    "fp8": (FP8, FP8, 20, "FLOAT8E4M3FN"),
    "fp8 e5m2 per channel": (QuantSpec(format="fp8_e5m2", granularity="channel"), None, 20, "FLOAT8E5M2"),
    "int4 groups": (QuantSpec(format="int4", **GROUP), None, 21, "INT4"),
    "uint4 groups": (
        QuantSpec(format="uint4", symmetric=False, **GROUP), QuantSpec(format="uint8", symmetric=False), 21, "UINT4",
    ),
    "int3 as int4": (QuantSpec(format="int3", granularity="channel"), None, 21, "INT4"),
    "int8 and int16": (QuantSpec(granularity="channel"), QuantSpec(format="int16"), 21, "INT8"),
    "int2": (QuantSpec(format="int2", granularity="channel"), None, 25, "INT2"),
    "fp4": (QuantSpec(format="fp4_e2m1", **GROUP), QuantSpec(format="fp4_e2m1"), 23, "FLOAT4E2M1"),
    "nvfp4": (QuantSpec(format="nvfp4"), None, 23, "FLOAT4E2M1"),
    "mxfp4": (QuantSpec(format="mxfp4", ragged=True), None, 24, "FLOAT4E2M1"),
    "mxfp8": (QuantSpec(format="mxfp8_e4m3", ragged=True), None, 24, "FLOAT8E4M3FN"),
    "mxint8": (QuantSpec(format="mxint8", ragged=True), None, 24, "INT8"),
    "mxfp6 e2m3": (QuantSpec(format="mxfp6_e2m3", ragged=True), None, 28, "FLOAT6E2M3"),
    "mxfp6 e3m2": (QuantSpec(format="mxfp6_e3m2", ragged=True), None, 28, "FLOAT6E3M2"),
}  # fmt: skip
RUNS = {"fp8 e5m2 per channel", "int4 groups", "uint4 groups", "int3 as int4", "int8 and int16", "int2"}


def quantized(weight, given):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)).eval()
    x = torch.randn(16, 64)
    config = QuantConfig(rules=(Rule(select="linear", scheme=Scheme(weight=weight, input=given)),))
    return graphq.quantize(model, config, [x], target="onnx", progress=False), x


def values_of(graph, x):
    """name → value of every quantize and dequantize, run in torch."""
    seen = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n.target in (QUANTIZE, DEQUANTIZE):
                seen[n.name] = value.detach()
            return value

    Watch(graph).run(x, enable_io_processing=False)
    return seen


@pytest.mark.parametrize("name", CASES)
def test_the_reference_evaluator_computes_the_same_bits(name, tmp_path):
    weight, given, opset, kind = CASES[name]
    graph, x = quantized(weight, given)
    path = graphq.export(graph, tmp_path / "m.onnx")
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=opset <= 25)
    assert model.opset_import[0].version == opset and len(model.opset_import) == 1
    kinds = {onnx.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer}
    assert kind in kinds
    assert ("FLOAT8E8M0" in kinds) == name.startswith("mx") and (name != "nvfp4" or "FLOAT8E4M3FN" in kinds)
    results = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()}, intermediate=True)
    last_bit = 2**-22 if name == "nvfp4" else 0  # of a scale in two levels
    shares = [
        np.isclose(results[node], value.numpy(), rtol=last_bit, atol=0).mean()
        for node, value in values_of(graph, x).items()
        if node in results and value.dtype == torch.float32
    ]
    assert len(shares) == (4 if given else 2)
    # of the second layer's input, sums in another order may turn a code at a tie; all else is exact
    assert sorted(shares)[1:] == [1.0] * (len(shares) - 1) and min(shares) > 0.99
    np.testing.assert_allclose(results[model.graph.output[0].name], graph(x).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("name", sorted(RUNS))
def test_onnxruntime_computes_the_same_where_it_has_kernels(name, tmp_path):
    graph, x = quantized(*CASES[name][:2])
    path = graphq.export(graph, tmp_path / "m.onnx")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, graph(x).detach().numpy(), atol=1e-5)


def test_low_bits_are_small_in_the_file(tmp_path):
    sizes = {}
    for name in ("int8 and int16", "int4 groups", "int2", "nvfp4"):
        graph, _ = quantized(CASES[name][0], None)
        path = graphq.export(graph, tmp_path / "m.onnx")
        tensors = [t for t in onnx.load(str(path)).graph.initializer if t.dims == [48, 64]]
        sizes[name] = sum(len(t.raw_data) for t in tensors)
    assert sizes == {
        "int8 and int16": 48 * 64, "int4 groups": 48 * 64 // 2, "int2": 48 * 64 // 4, "nvfp4": 48 * 64 // 2
    }  # fmt: skip


def test_what_the_standard_cannot_say_is_refused_and_leaves_nothing(tmp_path):
    for weight, given in (
        (QuantSpec(format="mx6"), None),
        (QuantSpec(granularity="channel"), QuantSpec(dynamic=True)),
        (QuantSpec(granularity="channel"), QuantSpec(format="int3")),
    ):
        with pytest.raises(TargetError):
            quantized(weight, given)
    for weight, given in (
        (QuantSpec(granularity="block", block=(16, 16)), None),
        (QuantSpec(granularity="channel"), QuantSpec(format="int8", rounding="floor")),
    ):
        graph, _ = quantized(weight, given)
        with pytest.raises(ExportError):
            graphq.export(graph, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_fp8_activations_run_at_the_basic_level_where_a_relu_is_not_dropped(tmp_path):
    graph, x = quantized(FP8, FP8)
    path = graphq.export(graph, tmp_path / "m.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, graph(x).detach().numpy(), atol=1e-5)
