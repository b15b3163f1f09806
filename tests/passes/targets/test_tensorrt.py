"""Explicit quantization for TensorRT: placement by its rules, files that mean what was simulated, one calibration for
two targets."""

import onnx
import pytest
import torch
from torch import nn

import graphq
import zoo
from graphq.errors import StateError, TargetError
from graphq.lint import lint


class Residual(nn.Module):
    def __init__(self, shortcut: bool):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 8, 1) if shortcut else nn.Identity()
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = self.second(torch.relu(self.first(x)))
        return self.head(torch.relu(self.shortcut(x) + y).mean((2, 3)))


def images(count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(count)]


@pytest.fixture(scope="module", params=[False, True], ids=["identity", "shortcut"])
def residual(request):
    torch.manual_seed(1)
    model = Residual(request.param).eval()
    return graphq.quantize(model, "int8", images(), target="tensorrt", progress=False)


def test_q_and_dq_stand_on_layer_inputs_and_the_residual_branch_only(residual, tmp_path):
    model = onnx.load(graphq.export(residual, tmp_path / "m.onnx"))
    made = {o: n for n in model.graph.node for o in n.output}
    for node in model.graph.node:
        dequantized = [made[i].op_type == "DequantizeLinear" for i in node.input if i in made]
        if node.op_type in ("Conv", "Gemm"):
            assert dequantized == [True, True], node.name
        elif node.op_type == "Add":
            main = next(made[i] for i in node.input if made[i].op_type != "DequantizeLinear")
            assert sum(dequantized) == 1 and main.op_type == "Conv"
            assert main.metadata_props and any(p.value == "second" for p in main.metadata_props)
        elif node.op_type in ("Relu", "ReduceMean", "GlobalAveragePool"):
            assert not any(dequantized)


def test_codes_are_signed_with_zero_point_0_and_biases_float(residual, tmp_path):
    model = onnx.load(graphq.export(residual, tmp_path / "m.onnx"))
    assert lint(model, "tensorrt") == []
    types = {i.name: i.data_type for i in model.graph.initializer}
    biases = [types[n.input[2]] for n in model.graph.node if n.op_type in ("Conv", "Gemm")]
    assert biases and set(biases) == {onnx.TensorProto.FLOAT}


def test_the_file_means_what_was_simulated(residual, tmp_path):
    result = graphq.verify(residual, graphq.export(residual, tmp_path / "m.onnx"), images())
    assert result.agrees and result.kernels_sqnr == float("inf") and result.unseen == []


def test_explain_says_that_affine_was_asked_for(residual):
    rows = graphq.explain(residual).rows
    assert all("zero point 0 only" in r.reason for r in rows if r.action == "quantize")


@pytest.mark.parametrize("scheme", ["int4_weights", "nvfp4_weights", "fp8"])
def test_int4_blocks_and_small_floats_are_written_in_their_types(scheme, tmp_path):
    weight = graphq.QuantSpec(format="int4", granularity="group", group_size=64)
    weight = graphq.QuantSpec(format="nvfp4") if scheme == "nvfp4_weights" else weight
    specs = graphq.Scheme(weight=weight)
    if scheme == "fp8":
        fp8 = graphq.QuantSpec(format="fp8_e4m3")
        specs = graphq.Scheme(weight=fp8.model_copy(update={"granularity": "channel"}), input=fp8)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 96), nn.GELU(), nn.Linear(96, 64 if scheme == "fp8" else 128)).eval()
    rules = (graphq.Rule(select="linear" if scheme == "fp8" else "0", scheme=specs),)
    config = graphq.QuantConfig(rules=rules)
    data = [torch.randn(4, 128) for _ in range(2)]
    quantized = graphq.quantize(model, config, data, target="tensorrt", progress=False)
    path = graphq.export(quantized, tmp_path / "m.onnx")
    exported = onnx.load(path)
    reads = [n for n in exported.graph.node if n.op_type == "DequantizeLinear"]
    kinds = {i.name: i.data_type for i in exported.graph.initializer}
    wanted = onnx.TensorProto.INT4 if scheme == "int4_weights" else onnx.TensorProto.FLOAT8E4M3FN
    assert wanted in {kinds.get(n.input[0]) for n in reads}
    if scheme == "nvfp4_weights":
        scales = [n.output[0] for n in reads if kinds.get(n.input[0]) == wanted]
        assert [kinds[n.input[0]] for n in reads if n.input[1] in scales] == [onnx.TensorProto.FLOAT4E2M1]
        onnx.checker.check_model(exported)
        return  # ONNX Runtime has no kernel for fp4
    assert all(n.op_type != "Transpose" for n in exported.graph.node)
    result = graphq.verify(quantized, path, data)
    assert result.floats_sqnr > 100 and result.largest <= 1


def test_specs_that_no_kernel_takes_together_are_refused():
    specs = graphq.Scheme(
        weight=graphq.QuantSpec(format="int4", granularity="channel"), input=graphq.QuantSpec(format="int8")
    )
    config = graphq.QuantConfig(rules=(graphq.Rule(select="*", scheme=specs),))
    with pytest.raises(TargetError, match="int4 beside inputs in int8"):
        graphq.prepare(nn.Linear(8, 8), config, (torch.randn(2, 8),), target="tensorrt")


def test_one_calibration_gives_the_files_of_two_targets(tmp_path):
    crops = list(zoo.photo_crops(8, 0).split(4))
    model = zoo.efficientnet_lite0()
    runs = []
    counted = model.register_forward_hook(lambda *_: runs.append(1))
    both = graphq.quantize(model, "int8", crops, target=["onnxruntime", "tensorrt"], progress=False)
    counted.remove()
    alone = graphq.quantize(model, "int8", crops, target="onnxruntime", progress=False)
    ours, other = both["onnxruntime"].state_dict(), alone.state_dict()
    assert ours.keys() == other.keys() and all(torch.equal(ours[k], other[k]) for k in ours)
    paths = graphq.export(both, tmp_path / "m.onnx")
    assert {n: p.name for n, p in paths.items()} == {
        "onnxruntime": "m.onnxruntime.onnx",
        "tensorrt": "m.tensorrt.onnx",
    }
    for name, path in paths.items():
        assert lint(onnx.load(path), name) == []
        assert graphq.verify(both[name], path, crops[:1]).agrees


def test_every_observer_sees_the_data_once_for_all_targets():
    prepared = graphq.prepare(Residual(False).eval(), "int8", (images()[0],), target=["onnxruntime", "tensorrt"])
    calls = []
    for name, graph in prepared.items():
        graph.register_forward_hook(lambda *_, name=name: calls.append(name))
    graphq.calibrate(prepared, images(3), progress=False)
    assert set(calls) == {"onnxruntime"}
    scales = [q.scale for g in prepared.values() for q in graphq.quantizer.quantizers(g).values()]
    assert all(s is not None for s in scales)


def test_a_target_that_is_given_twice_is_refused():
    with pytest.raises(TargetError, match="once each"):
        graphq.prepare(nn.Linear(8, 8), "int8", (torch.randn(2, 8),), target=["tensorrt", "tensorrt"])


def test_two_machines_of_one_runtime_get_names_of_their_own():
    places = [graphq.get_target("onnxruntime", cpu=c) for c in ("avx2", "vnni")]
    prepared = graphq.prepare(nn.Linear(8, 8), "int8", (torch.randn(2, 8),), target=places)
    assert list(prepared) == ["onnxruntime-avx2", "onnxruntime-vnni"]


@pytest.mark.parametrize("target", ["tensorrt", "openvino"])
def test_a_tensor_added_to_itself_and_a_sum_behind_a_float_convolution_stay_float(target):
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

        def forward(self, x):
            y = self.a(x)
            z = torch.relu(y + y)
            return self.c(torch.relu(self.b(torch.relu(z)) + z))

    config = graphq.presets.CONFIGS["int8"].model_copy(update={"ignore": ("b",)})
    prepared = graphq.prepare(Sums(), config, (torch.randn(2, 4, 6, 6),), target=target)
    sums = [r for r in graphq.explain(prepared).rows if r.op.startswith("add")]
    assert [r.action for r in sums] == ["float", "float"]
    assert sums[1].reason == "the layer that would compute it stays float"


def test_functions_of_one_graph_say_which_to_give():
    both = graphq.prepare(nn.Linear(8, 8), "int8", (torch.randn(2, 8),), target=["onnxruntime", "tensorrt"])
    for call in (graphq.explain, lambda g: graphq.save(g, "nowhere"), lambda g: graphq.verify(g, "m.onnx", [])):
        with pytest.raises(StateError, match="takes one graph"):
            call(both)


def test_options_that_a_target_does_not_have_are_named():
    with pytest.raises(TargetError, match="'cpu' is no option of target 'tensorrt'"):
        graphq.get_target("tensorrt", cpu="avx2")
