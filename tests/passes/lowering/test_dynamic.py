"""Inputs quantized at run time: the kernel's arithmetic bit for bit, placement, and what has no such kernel."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import nn

import graphq
import zoo
from graphq.errors import TargetError
from graphq.graph.dynamic_ops import dynamic_uint8, token_qgemm
from graphq.lint import lint
from graphq.passes.targets.onnxruntime import saturates_here


@pytest.fixture(scope="module")
def dynamic_quantize_linear():
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])
    kinds = {"codes": TensorProto.UINT8, "scale": TensorProto.FLOAT, "zero": TensorProto.UINT8}
    outputs = [helper.make_tensor_value_info(n, k, None) for n, k in kinds.items()]
    model = helper.make_model(helper.make_graph([node], "g", [x], outputs), ir_version=8)
    model.opset_import[0].version = 13
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    low=st.sampled_from([0.0, 1e-6, -1e-6]) | st.floats(1e-3, 8) | st.floats(-8, -1e-3),
    width=st.sampled_from([0.0, 1e-6, 1.0, 700.0]),
)
def test_scale_zero_point_and_codes_are_those_of_onnx_runtime(dynamic_quantize_linear, seed, low, width):
    x = (np.random.default_rng(seed).random(51) * width + low).astype(np.float32)
    codes, scale, zero = dynamic_quantize_linear.run(None, {"x": x})
    ours, our_scale, our_zero = dynamic_uint8(torch.from_numpy(x))
    assert our_scale.item() == scale and our_zero.item() == zero
    assert np.array_equal((ours + our_zero).numpy(), codes.astype(np.float32))


KERNELS = {"int8_dynamic": "DynamicQuantizeMatMul", "int8_dynamic_token": "MatMulInteger", "W8A8": "MatMulInteger"}


@pytest.mark.parametrize("preset", KERNELS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 24), (2, 5, 24)])
def test_a_product_is_the_runtimes_bit_for_bit(bias, shape, preset, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 33, bias=bias), nn.ReLU(), nn.Linear(33, 7, bias=bias)).eval()
    data = [torch.randn(shape) * 3 for _ in range(4)]
    data[0][..., 0, :] = 0  # a token without a magnitude
    config = preset if preset in graphq.presets.CONFIGS else graphq.QuantConfig(rules=(graphq.Rule(scheme=preset),))
    quantized = graphq.quantize(model, config, data, progress=False)
    path = graphq.export(quantized, tmp_path / "m.onnx")
    result = graphq.verify(quantized, path, data)
    assert len(result.products) == 2 and all(p.noise == 0 for p in result.products)
    explanation = graphq.explain(quantized, path)
    assert explanation.kernels()[KERNELS[preset]] == 2 and not explanation.disagreements


@pytest.mark.parametrize("steps", [127.0, 127.5])
def test_a_scale_per_token_is_the_formula(steps):
    generator = np.random.default_rng(0)
    x, w = generator.normal(size=(3, 7, 24)).astype(np.float32), generator.integers(-127, 128, (24, 5), np.int8)
    w_scale = generator.random(5, np.float32)
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(steps)
    codes = np.clip(np.round(x / scale), -128, 127)
    expected = (codes.astype(np.float64) @ w) * scale * w_scale
    tensors = [torch.from_numpy(t) for t in (x, w, w_scale, np.zeros(5, np.int8))]
    np.testing.assert_allclose(token_qgemm(*tensors, steps), expected, rtol=1e-5, atol=1e-5)


def test_a_token_does_not_feel_its_neighbours():
    torch.manual_seed(0)
    model, x = nn.Linear(24, 8).eval(), torch.randn(4, 24)
    quantized = graphq.quantize(model, "int8_dynamic_token", [x], progress=False)
    loud = torch.cat([x[:3], 100 * x[3:]])
    assert torch.equal(quantized(x)[:3], quantized(loud)[:3])


def test_minilm_runs_all_its_linears_on_the_dynamic_kernel(tmp_path):
    data = [zoo.sentences(2, i, length=32) for i in range(2)]
    model = zoo.minilm()
    quantized = graphq.quantize(model, "int8_dynamic", data, dynamic_shapes="batch+sequence", progress=False)
    path = graphq.export(quantized, tmp_path / "m.onnx")
    explanation = graphq.explain(quantized, path)
    linears = [r for r in explanation.rows if r.op == "linear"]
    assert linears and {r.found for r in linears} == {"DynamicQuantizeMatMul"} and not explanation.disagreements
    assert graphq.verify(quantized, path, data[:1]).agrees
    assert graphq.compare(model, quantized, data, per_op=False).sqnr > 14


@pytest.mark.parametrize("ignore", ["0", "4"])
def test_float_linears_beside_dynamic_ones_keep_their_names(ignore, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)).eval()
    config = graphq.presets.CONFIGS["int8_dynamic"].model_copy(update={"ignore": (ignore,)})
    data = [torch.randn(3, 16) for _ in range(2)]
    quantized = graphq.quantize(model, config, data, progress=False)
    path = graphq.export(quantized, tmp_path / "m.onnx")
    assert graphq.verify(quantized, path, data).agrees and not graphq.explain(quantized, path).disagreements


@pytest.mark.parametrize("config", ["int8", "int8_dynamic", "int8_dynamic_token"])
@pytest.mark.parametrize("options", [{}, {"form": "qoperator"}, {"cpu": "avx2", "guard": False}])
def test_vectors_without_a_batch(config, options, tmp_path):
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16, bias=False)), [torch.randn(16)]
    place = graphq.get_target("onnxruntime", **options)
    quantized = graphq.quantize(model.eval(), config, data, target=place, dynamic_shapes=None, progress=False)
    place.reference(quantized)(data[0])
    path = graphq.export(quantized, tmp_path / "m.onnx")
    assert saturates_here() is not (options.get("cpu") == "avx2") or graphq.verify(quantized, path, data).agrees


def test_other_ops_stay_float_and_say_why():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).eval()
    prepared = graphq.prepare(model, "int8_dynamic", (torch.randn(2, 3, 4, 4),))
    conv = next(r for r in graphq.explain(prepared).rows if r.op.startswith("conv2d"))
    assert conv.action == "float" and "finds scales at run time" in conv.reason


@pytest.mark.parametrize("change", [{"granularity": "token"}, {"format": "int8"}, {"symmetric": True}])
def test_scales_that_the_kernel_does_not_find_are_refused(change):
    spec = graphq.QuantSpec(**{"format": "uint8", "symmetric": False, "dynamic": True} | change)
    scheme = graphq.Scheme(weight=graphq.QuantSpec(granularity="channel"), input=spec)
    config = graphq.QuantConfig(rules=(graphq.Rule(select="*", scheme=scheme),))
    with pytest.raises(TargetError, match="no kernels that find scales at run time"):
        graphq.prepare(nn.Linear(8, 8), config, (torch.randn(2, 8),))


@pytest.mark.parametrize("preset", ["int8_dynamic", "int8_dynamic_token"])
def test_a_guard_that_counts_on_calibration_counts_on_nothing_here(preset):
    torch.manual_seed(0)
    model, data = nn.Linear(64, 16).eval(), [torch.rand(8, 64)]
    places = [graphq.get_target("onnxruntime", cpu="avx2", guard=guard) for guard in (True, "calibrated")]
    a, b = (graphq.quantize(model, preset, data, target=place, progress=False)(data[0]) for place in places)
    assert torch.equal(a, b)


def test_weights_are_guarded_where_the_kernel_saturates(tmp_path):
    torch.manual_seed(0)
    model, data = nn.Linear(64, 16).eval(), [torch.rand(8, 64)]
    place = graphq.get_target("onnxruntime", cpu="avx2")
    quantized = graphq.quantize(model, "int8_dynamic", data, target=place, progress=False)
    path = graphq.export(quantized, tmp_path / "m.onnx")
    assert not lint(onnx.load(path), saturates=True)
    weight = next(onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer if i.data_type == 3)
    pairs = weight.astype(int).reshape(32, 2, 16)
    assert (np.clip(pairs, 0, None).sum(1) <= 128).all() and (np.clip(-pairs, 0, None).sum(1) <= 128).all()
