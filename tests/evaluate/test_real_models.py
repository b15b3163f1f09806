"""The main job on trained models: what runs is what was predicted and what was simulated."""

import math

import onnx
import onnxruntime as ort
import pytest
import torch

import graphq
import zoo
from graphq.errors import RuntimeMismatch
from graphq.evaluate.islands import SimulatedKernels
from graphq.evaluate.taps import session
from graphq.evaluate.verify import feed_of


@pytest.fixture(params=["effnet", "minilm"])
def case(request):
    return request.getfixturevalue(request.param)


def test_every_predicted_kernel_is_the_one_in_the_optimized_model(case):
    explanation = graphq.explain(case.quantized, case.path)
    assert explanation.disagreements == []
    assert explanation.undecided == []


def test_the_kernels_are_integer_kernels(effnet, minilm):
    cnn = graphq.explain(effnet.quantized, effnet.path).kernels()
    assert cnn == {"QLinearConv": 49, "QLinearAdd": 9, "QLinearGlobalAveragePool": 1, "Reshape": 1, "QGemm": 1}
    assert graphq.explain(minilm.quantized, minilm.path).kernels()["MatMulIntegerToFloat"] == 36


def test_codes_equal_those_of_the_runtime_op_by_op(case):
    result = graphq.verify(case.quantized, case.path, case.held_out[:1])
    assert result.share_equal >= 0.998
    assert result.largest <= 1
    assert result.unseen == []
    assert result.same_as_default_session


def test_a_model_with_the_float_ops_of_the_runtime_is_simulated_bit_for_bit(case):
    result = graphq.verify(case.quantized, case.path, case.held_out[:1])
    assert result.share_equal >= 0.99999
    assert result.kernels_sqnr == math.inf
    assert result.floats_sqnr > 90
    assert result.agrees


def test_a_wrong_kernel_shows_end_to_end(minilm, monkeypatch):
    """What the runtime computes itself must not hide an error of the simulation."""
    right = torch.ops.graphq.qgemm.default

    class Wrong(SimulatedKernels):
        def call_function(self, target, args, kwargs):
            value = super().call_function(target, args, kwargs)
            return value * 1.0001 if target is right else value

    monkeypatch.setattr("graphq.evaluate.verify.SimulatedKernels", Wrong)
    assert graphq.verify(minilm.quantized, minilm.path, minilm.held_out[:1]).kernels_sqnr < 60


def test_a_wrong_float_op_behind_the_last_codes_shows(tmp_path):
    x = torch.randn(4, 8)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()).eval()
    quantized = graphq.quantize(model, "int8", [x], progress=False)
    path = graphq.export(quantized, tmp_path / "model.onnx")
    assert graphq.verify(quantized, path, [x]).agrees
    file = onnx.load(path)
    gelu = next(n for n in file.graph.node if n.op_type == "Gelu")
    gelu.op_type = "Relu"
    del gelu.attribute[:]
    onnx.save(file, tmp_path / "wrong.onnx")
    result = graphq.verify(quantized, tmp_path / "wrong.onnx", [x])
    assert result.floats_sqnr < 40 and not result.agrees


def test_accuracy_is_close_to_the_float_model(effnet, minilm):
    assert graphq.compare(effnet.model, effnet.quantized, effnet.held_out, per_op=False).sqnr > 14.5
    quality = graphq.compare(minilm.model, minilm.quantized, minilm.held_out, per_op=False)
    assert quality.sqnr > 16
    assert quality.cosine > 0.987


def test_the_worst_ops_come_first_and_name_their_layers(minilm):
    ops = graphq.compare(minilm.model, minilm.quantized, minilm.held_out[:1]).ops
    assert [o.sqnr for o in ops] == sorted(o.sqnr for o in ops)
    assert len(ops) > 80
    assert any(o.layer == "encoder.layer.0.attention.self.query" for o in ops)


def test_the_file_is_valid_small_dynamic_and_says_how_it_was_made(effnet):
    model = onnx.load(effnet.path)
    onnx.checker.check_model(model, full_check=True)
    assert effnet.path.stat().st_size < 5.5e6
    assert {p.key: p.value for p in model.metadata_props}["graphq.config"] == "int8"
    assert "graphq.cpu" in {p.key for p in model.metadata_props}
    paths = {p.value for n in model.graph.node for p in n.metadata_props if p.key == "graphq.module"}
    assert "_blocks.3._depthwise_conv" in paths
    weights = [i for i in model.graph.initializer if i.name.endswith(".codes")]
    assert len(weights) >= 98
    assert {i.data_type for i in weights} <= {onnx.TensorProto.INT8, onnx.TensorProto.INT32}
    for batch in (1, 3):
        feed = feed_of(effnet.quantized, (zoo.photo_crops(batch, seed=5),), {})
        assert session(effnet.path).run(None, feed)[0].shape == (batch, 1000)


def test_sequence_length_stays_dynamic(minilm):
    ids = torch.randint(1000, 2000, (3, 17))
    feed = feed_of(minilm.quantized, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert session(minilm.path).run(None, feed)[0].shape == (3, 17, 384)


def test_a_guarded_model_for_avx2_is_verified_too(effnet, tmp_path):
    target = graphq.get_target("onnxruntime", cpu="avx2")
    gm = graphq.quantize(effnet.model, "int8", effnet.calibration[:8], target=target, progress=False)
    path = graphq.export(gm, tmp_path / "guarded.onnx")
    assert graphq.verify(gm, path, effnet.held_out[:1]).output_sqnr >= 35
    assert graphq.compare(effnet.model, gm, effnet.held_out, per_op=False).sqnr > 14.5


def test_verify_finds_a_planted_fault_and_names_the_first_op(effnet, tmp_path):
    model = onnx.load(effnet.path)
    conv = [n for n in model.graph.node if n.op_type == "Conv"][5]
    name = next(n for n in model.graph.node if n.output[0] == conv.input[1]).input[0]
    codes = next(i for i in model.graph.initializer if i.name == name)
    codes.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(codes), name))
    onnx.save(model, tmp_path / "wrong.onnx")
    result = graphq.verify(effnet.quantized, tmp_path / "wrong.onnx", effnet.held_out[:1])
    assert result.first_diverging is not None
    assert result.first_diverging.kernel == "QLinearConv"
    assert [t.name for t in result.tensors if t.largest > 1] == [result.first_diverging.name]


def test_verify_refuses_a_file_of_another_graph(effnet, minilm):
    with pytest.raises(RuntimeMismatch, match="not exported from this graph"):
        wrong = onnx.load(effnet.path)
        for node in wrong.graph.node:
            node.output[:] = [f"x_{o}" if o.startswith("quantize_default") else o for o in node.output]
            node.input[:] = [f"x_{o}" if o.startswith("quantize_default") else o for o in node.input]
        renamed = effnet.path.with_name("renamed.onnx")
        onnx.save(wrong, renamed)
        graphq.verify(effnet.quantized, renamed, effnet.held_out[:1])


def test_float_export_is_the_float_model(minilm, tmp_path):
    path = graphq.export(graphq.capture_like(minilm.model, minilm.quantized), tmp_path / "fp32.onnx")
    batch = minilm.held_out[0]
    with torch.no_grad():
        want = minilm.model(**batch).last_hidden_state
    got = ort.InferenceSession(path).run(None, feed_of(minilm.quantized, (), batch))[0]
    torch.testing.assert_close(torch.from_numpy(got), want, atol=1e-4, rtol=1e-3)
