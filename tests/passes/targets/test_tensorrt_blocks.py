"""NVFP4 and MXFP8 layers for TensorRT: its own ops, computed here by onnx.reference with these ops in NumPy."""

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.config.presets import SCHEMES
from graphq.errors import CalibrationError, ConfigError, RuntimeMismatch, TargetError
from graphq.lint import lint


def blocks_of(x, axis, size):
    shape = [*x.shape]
    shape[axis : axis + 1] = [x.shape[axis] // size, size]
    return x.reshape(shape), axis + 1


class TRT_FP4DynamicQuantize(OpRun):
    op_domain = "trt"

    def _run(self, x, scale, axis=None, block_size=None, scale_type=None):
        assert scale_type == onnx.TensorProto.FLOAT8E4M3FN
        parts, along = blocks_of(x.astype(np.float64), axis, block_size)
        scales = (np.abs(parts).max(along) / 6 / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
        steps = np.expand_dims(scales.astype(np.float64) * scale, along)
        return (parts / steps).reshape(x.shape).astype(ml_dtypes.float4_e2m1fn), scales


class TRT_MXFP8DynamicQuantize(OpRun):
    op_domain = "trt"

    def _run(self, x, axis=None, block_size=None, output_dtype=None):
        assert output_dtype == onnx.TensorProto.FLOAT8E4M3FN
        parts, along = blocks_of(x.astype(np.float64), axis, block_size)
        exponents = np.ceil(np.log2(np.abs(parts).max(along) / 448))
        codes = (parts / np.expand_dims(2.0**exponents, along)).reshape(x.shape).astype(ml_dtypes.float8_e4m3fn)
        return codes, (exponents + 127).astype(np.uint8)


class TRT_MXFP8DequantizeLinear(OpRun):
    op_domain = "trt"

    def _run(self, x, scale, axis=None, block_size=None, output_dtype=None):
        assert output_dtype == onnx.TensorProto.FLOAT and scale.dtype == np.uint8
        steps = np.repeat(2.0 ** (scale.astype(np.float64) - 127), block_size, axis)
        return ((x.astype(np.float64) * steps).astype(np.float32),)


OPS = [TRT_FP4DynamicQuantize, TRT_MXFP8DynamicQuantize, TRT_MXFP8DequantizeLinear]


def quantized(config, sizes=(64, 96, 32)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*sizes[:2]), nn.GELU(), nn.Linear(*sizes[1:])).eval()
    data = [torch.randn(4, 5, sizes[0]) for _ in range(3)]
    config = QuantConfig(rules=(Rule(select="linear", scheme=config),)) if config in SCHEMES else config
    return graphq.quantize(model, config, data, target="tensorrt", progress=False), data


@pytest.mark.parametrize("config", ["NVFP4", "NVFP4_DEFAULT_CFG", "MXFP8_DEFAULT_CFG"])
def test_the_file_means_what_was_simulated(config, tmp_path):
    graph, data = quantized(config)
    assert [r.action for r in graphq.explain(graph).rows if r.op == "linear"] == ["quantize"] * 2
    path = graphq.export(graph, tmp_path / "m.onnx")
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert not lint(model, "tensorrt")
    ops = [n.op_type for n in model.graph.node if n.domain == "trt"]
    own = "TRT_FP4DynamicQuantize" if "NVFP4" in config else "TRT_MXFP8DynamicQuantize"
    assert ops.count(own) == 2 and ops.count("TRT_MXFP8DequantizeLinear") == (0 if "NVFP4" in config else 4)
    (theirs,) = ReferenceEvaluator(model, new_ops=OPS).run(None, {model.graph.input[0].name: data[0].numpy()})
    ours = graph(data[0]).detach().numpy()
    assert np.abs(theirs - ours).max() < 1e-5 * np.abs(ours).max()


def test_weights_in_blocks_are_stored_as_such(tmp_path):
    sizes = {}
    for config in ("NVFP4", "MXFP8"):
        model = onnx.load(graphq.export(quantized(config)[0], tmp_path / f"{config}.onnx"))
        kinds = [onnx.TensorProto.DataType.Name(i.data_type) for i in model.graph.initializer]
        sizes[config] = kinds.count("FLOAT4E2M1"), kinds.count("FLOAT8E4M3FN"), kinds.count("UINT8")
    assert sizes["NVFP4"][0] == 4 and sizes["MXFP8"] == (0, 2, 2)  # fp4: codes and zero points


def test_what_tensorrt_has_no_form_for_is_refused():
    mixed = Scheme(weight=QuantSpec(format="nvfp4"), input=QuantSpec(format="mxfp4", dynamic=True))
    static = Scheme(weight=QuantSpec(format="fp8_e4m3", granularity="group", group_size=32), input=SCHEMES["FP8"].input)
    for scheme, words in ((mixed, "no kernels that find scales at run time"), (static, "in blocks, both of the same")):
        config = QuantConfig(rules=(Rule(select="linear", scheme=scheme),))
        with pytest.raises(TargetError, match=words):
            graphq.prepare(nn.Linear(64, 32), config, (torch.randn(2, 64),), target="tensorrt")
    with pytest.raises((ConfigError, CalibrationError), match="40"):
        quantized("NVFP4", sizes=(40, 96, 32))


def test_verify_says_that_onnx_runtime_has_no_such_ops(tmp_path):
    graph, data = quantized("MXFP8")
    with pytest.raises(RuntimeMismatch, match="ONNX Runtime does not run this model"):
        graphq.verify(graph, graphq.export(graph, tmp_path / "m.onnx"), data)
