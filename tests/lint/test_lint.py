"""lint finds faults that were planted with other tools' APIs, nothing in clean models, and repairs what it can."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn
from typer.testing import CliRunner

import graphq
from graphq.cli import app
from graphq.errors import RuntimeMismatch
from graphq.evaluate.taps import optimized_model, session
from graphq.lint import RULES, fix, lint
from onnx_build import RNG, Build


def conv_on_the_wrong_axis():
    b = Build([1, 8, 6, 6])
    b.node("Conv", [b.qdq("x", "xd"), b.weight("w", (8, 8, 3, 3), axis=1)], "y", kernel_shape=[3, 3])
    b.qdq("y", "yd", 0.05)
    return b.model(), {"weight_axis"}


def gemm_on_the_wrong_axis():
    b = Build([4, 16])
    b.node("Gemm", [b.qdq("x", "xd"), b.weight("w", (16, 16), axis=0)], "y", transB=0)
    b.qdq("y", "yd", 0.05)
    return b.model(), {"weight_axis"}


def gemm_with_another_bias_scale():
    b = Build([4, 16])
    x, w = b.qdq("x", "xd"), b.weight("w", (8, 16), axis=0)
    bias = b.constant("b_q", RNG.integers(-500, 500, 8), np.int32)
    b.node("DequantizeLinear", [bias, b.constant("b_s", np.float32(0.002), np.float32)], "bd")
    b.constants[-1].name = "b_s"
    b.nodes[-1].input.append(b.constant("b_z", 0, np.int32))
    b.node("Gemm", [x, w, "bd"], "y", transB=1)
    b.qdq("y", "yd", 0.05)
    return b.model(), {"bias_scale"}


def quantized_twice():
    b = Build([1, 8, 6, 6])
    x = b.qdq(b.qdq("x", "xd"), "xdd")
    b.node("Conv", [x, b.weight("w", (4, 8, 3, 3), axis=0)], "y", kernel_shape=[3, 3])
    b.qdq("y", "yd", 0.05)
    return b.model(), {"double_qdq"}


def quantized_again_with_another_scale():
    b = Build([1, 8, 6, 6])
    x = b.qdq(b.qdq("x", "xd", 0.02), "xdd", 0.05)
    b.node("Conv", [x, b.weight("w", (4, 8, 3, 3), axis=0)], "y", kernel_shape=[3, 3])
    b.qdq("y", "yd", 0.05)
    return b.model(), {"requantized"}


def activation_per_channel():
    b = Build([4, 16])
    x = b.qdq("x", "xd", np.full(16, 0.02), axis=1)
    b.node("MatMul", [x, b.weight("w", (16, 8), axis=1)], "y")
    return b.model(), {"channel_activation"}


def no_zero_points():
    b = Build([4, 16])
    b.node("Transpose", [b.qdq("x", "xd", with_zero=False)], "y", perm=[1, 0])
    b.qdq("y", "yd", with_zero=False)
    return b.model(), {"zero_point"}


def two_quantizers_of_one_result():
    b = Build([1, 8, 6, 6])
    y = b.node("Conv", [b.qdq("x", "xd"), b.weight("w", (4, 8, 3, 3), axis=0)], "y", kernel_shape=[3, 3])
    first, second = b.qdq(y, "y1", 0.05), b.qdq(y, "y2", 0.05)
    b.node("Add", [first, second], "z")
    b.qdq("z", "zd", 0.1)
    return b.model(), {"several_quantizations"}


def quantized_around_an_op_without_kernel():
    b = Build([4, 16])
    y = b.node("MatMul", [b.qdq("x", "xd"), b.weight("w", (16, 8), axis=1)], "y")
    b.node("Tanh", [b.qdq(y, "yd", 0.05)], "t")
    b.qdq("t", "td", 1 / 128)
    return b.model(), {"no_kernel"}


def weight_folded_to_float():
    b = Build([1, 8, 6, 6])
    w = b.constant("w", RNG.standard_normal((4, 8, 3, 3)), np.float32)
    b.node("Conv", [b.qdq("x", "xd"), w], "y", kernel_shape=[3, 3])
    b.qdq("y", "yd", 0.05)
    return b.model(), {"float_weight"}


def result_of_a_conv_left_float():
    b = Build([1, 8, 6, 6])
    b.node("Conv", [b.qdq("x", "xd"), b.weight("w", (4, 8, 3, 3), axis=0)], "y", kernel_shape=[3, 3])
    return b.model(), {"float_result"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.b(torch.relu(self.a(x))).mean((2, 3)))


class Reader(CalibrationDataReader):
    def __init__(self):
        self.left = [{"x": RNG.standard_normal((1, 3, 12, 12)).astype(np.float32)} for _ in range(4)]

    def get_next(self):
        return self.left.pop() if self.left else None


@pytest.fixture(scope="module")
def float_file(tmp_path_factory):
    torch.manual_seed(0)
    captured = graphq.capture(Net().eval(), (torch.randn(1, 3, 12, 12),))
    return graphq.export(captured, tmp_path_factory.mktemp("float") / "m.onnx")


def by_onnxruntime(float_file, **options):
    path = float_file.parent / "q.onnx"
    quantize_static(str(float_file), str(path), Reader(), quant_format=QuantFormat.QDQ, **options)
    return onnx.load(path)


HAND_MADE = [
    conv_on_the_wrong_axis, gemm_on_the_wrong_axis, gemm_with_another_bias_scale, quantized_twice,
    quantized_again_with_another_scale, activation_per_channel, no_zero_points, two_quantizers_of_one_result,
    quantized_around_an_op_without_kernel, weight_folded_to_float, result_of_a_conv_left_float,
]  # fmt: skip


@pytest.mark.parametrize("make", HAND_MADE, ids=lambda f: f.__name__)
def test_the_planted_fault_is_found_and_nothing_else(make):
    model, wanted = make()
    assert {f.rule for f in lint(model)} == wanted


def test_symmetric_activations_of_quantize_static_keep_relus_from_fusing(float_file):
    model = by_onnxruntime(
        float_file, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8, per_channel=True,
        extra_options={"ActivationSymmetric": True},
    )  # fmt: skip
    found = lint(model)
    assert {f.rule for f in found} == {"relu_zero_point"}  # what stands around the ReduceMean its neighbours need
    assert "needs -128" in found[0].consequence


def test_full_range_weights_of_quantize_static_saturate_and_reduced_ones_do_not(float_file):
    options = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    full, reduced = by_onnxruntime(float_file, **options), by_onnxruntime(float_file, reduce_range=True, **options)
    assert {f.rule for f in lint(full, saturates=True)} == {"saturation"}
    assert not lint(full) and not lint(reduced, saturates=True)


def test_models_of_graphq_are_clean(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 12, 12)
    for cpu in ("vnni", "avx2"):
        target = graphq.passes.targets.get_target("onnxruntime", cpu=cpu)
        path = graphq.export(
            graphq.quantize(Net().eval(), data=[x], target=target, progress=False), tmp_path / "m.onnx"
        )
        assert not lint(onnx.load(path), saturates=cpu == "avx2")


REPAIRABLE = {
    conv_on_the_wrong_axis: "QLinearConv", gemm_on_the_wrong_axis: "QGemm", gemm_with_another_bias_scale: "QGemm",
    quantized_twice: "QLinearConv", two_quantizers_of_one_result: "QLinearConv", no_zero_points: "Transpose",
}  # fmt: skip


@pytest.mark.parametrize("make", REPAIRABLE, ids=lambda f: f.__name__)
def test_a_repaired_model_computes_what_its_file_says_within_one_step(make, tmp_path):
    model, wanted = make()
    before = model.SerializeToString()
    repaired, left = fix(model)
    assert model.SerializeToString() == before
    assert wanted.isdisjoint(f.rule for f in left)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = {"x": RNG.standard_normal(shape).astype(np.float32)}
    said = session(before, optimize=False).run(None, x)[0]
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # no saturation here: it is another fault
    runs = [
        onnxruntime.InferenceSession(m, options, providers=["CPUExecutionProvider"]).run(None, x)[0]
        for m in (before, repaired.SerializeToString())
    ]
    step = max(numpy_helper.to_array(i).max() for i in model.graph.initializer if i.name in ("yd_s", "zd_s"))
    assert np.abs(runs[1] - said).max() <= step * 1.001
    if make in (conv_on_the_wrong_axis, gemm_on_the_wrong_axis, gemm_with_another_bias_scale):
        assert np.abs(runs[0] - said).max() > 2 * step  # what the runtime makes of the faulty file
    path = tmp_path / "repaired.onnx"
    onnx.save(repaired, path)
    kernels = [n.op_type for n in optimized_model(path).graph.node]
    assert REPAIRABLE[make] in kernels


def test_tensorrt_wants_signed_codes_around_zero_and_float_biases(float_file):
    model = by_onnxruntime(
        float_file, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": True},
    )  # fmt: skip
    assert {f.rule for f in lint(model, "tensorrt")} == {"quantized_bias"}
    repaired, left = fix(model, "tensorrt")
    assert not left
    assert not any(i.data_type == TensorProto.INT32 for i in repaired.graph.initializer)
    unsigned = by_onnxruntime(float_file, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    assert {f.rule for f in lint(unsigned, "tensorrt")} == {"symmetric", "quantized_bias"}


def test_the_command_line_repairs_and_says_what_is_left(tmp_path):
    model, _ = quantized_twice()
    onnx.save(model, tmp_path / "bad.onnx")
    run = CliRunner()
    result = run.invoke(app, ["lint", str(tmp_path / "bad.onnx"), "--cpu", "vnni"])
    assert result.exit_code == 1 and "double_qdq" in result.output
    result = run.invoke(
        app, ["lint", str(tmp_path / "bad.onnx"), "--cpu", "vnni", "--fix", str(tmp_path / "good.onnx")]
    )
    assert result.exit_code == 0
    result = run.invoke(app, ["lint", str(tmp_path / "good.onnx"), "--cpu", "vnni", "--json"])
    assert result.exit_code == 0 and '"found": []' in result.output


def test_every_rule_says_what_it_is_about():
    for rules in RULES.values():
        assert all(r.__doc__ for r in rules.values())


def test_ops_between_integer_kernels_are_no_finding(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Conv2d(8, 8, 3)).eval()
    graph = graphq.quantize(net, data=[torch.randn(2, 3, 12, 12)], progress=False)
    assert not lint(onnx.load(graphq.export(graph, tmp_path / "m.onnx")))


def test_what_cannot_be_proved_is_not_repaired():
    model, _ = quantized_twice()
    shared = onnx.ModelProto()
    shared.CopyFrom(model)
    shared.graph.input.append(helper.make_tensor_value_info("xd_s", TensorProto.FLOAT, []))
    with pytest.raises(RuntimeMismatch, match="initializers that are inputs"):
        fix(shared)


def test_only_the_result_that_is_quantized_twice_is_repaired():
    b = Build([4, 16])
    b.constant("sizes", [8, 8], np.int64)
    b.nodes.append(helper.make_node("Split", [b.qdq("x", "xd"), "sizes"], ["p", "q"], name="split", axis=1))
    b.node("Relu", ["p"], "p1")
    b.node("Neg", ["p"], "p2")
    b.node("Sum", [b.qdq("q", "q1", 0.03), b.qdq("q", "q2", 0.03), "p1", "p2"], "y")
    model = b.model()
    assert [f.rule for f in lint(model) if f.fixable] == ["several_quantizations"]
    repaired, left = fix(model)
    assert not any(f.fixable for f in left)
    assert sum(n.op_type == "QuantizeLinear" for n in repaired.graph.node) == 2


def test_a_quantization_that_is_an_output_is_no_repair_that_is_promised():
    b = Build([4, 16])
    b.qdq(b.qdq("x", "xd"), "xdd")
    model = b.model(["xdd"])
    model.graph.output.append(helper.make_tensor_value_info("xdd_q", TensorProto.UINT8, [4, 16]))
    assert not any(f.fixable for f in lint(model))
