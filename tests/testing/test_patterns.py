"""Quantization patterns and what comes after them, on graphs that are generated from the patterns."""

import pytest
import torch

import graphq
from graphq.config import QuantConfig
from graphq.passes.lowering.onnx_qdq import lower_to_onnx_qdq
from graphq.passes.patterns import PATTERNS
from graphq.passes.placement import annotate, insert_quantizers
from graphq.passes.targets import get_target
from graphq.passes.targets.onnxruntime import KERNELS
from graphq.quantizer import quantizers
from graphq.testing import Unfit, prove

COMPUTING = [p for p in PATTERNS if any(k.role == "compute" for k in KERNELS.get(p.family, ()))]
TARGET = get_target("onnxruntime", cpu="vnni")
EVERYTHING = QuantConfig.load("int8").model_copy(update={"rules": QuantConfig.load("int8").rules[:1]})


def place(gm):
    annotate(gm, EVERYTHING, TARGET)
    insert_quantizers(gm)
    return len(quantizers(gm))


@pytest.mark.parametrize("pattern", COMPUTING, ids=lambda p: p.__name__)
def test_placing_quantizers_changes_nothing_until_they_are_calibrated(pattern):
    assert prove(pattern, transform=place, equivalence="exact", examples=30).rewritten > 5


def converted(gm):
    """Quantized on its own inputs."""
    inputs = gm.meta["graphq_example"].args
    if any(t.dtype != torch.float32 for t in inputs) or not inputs:
        raise Unfit
    prepared = graphq.prepare(gm, EVERYTHING, target=TARGET)
    if not quantizers(prepared):
        raise Unfit
    return graphq.convert(graphq.calibrate(prepared, [inputs], progress=False))


@pytest.mark.parametrize("pattern", COMPUTING, ids=lambda p: p.__name__)
def test_lowering_to_the_form_of_onnx_changes_nothing(pattern):
    def lower(gm):
        lowered = lower_to_onnx_qdq(gm)
        gm.graph = lowered.graph
        for name, module in lowered.named_children():
            setattr(gm, name, module)
        for name, buffer in lowered.named_buffers(recurse=False):
            gm.register_buffer(name, buffer)
        return 1

    assert prove(pattern, given=converted, transform=lower, equivalence="ulp", examples=30).rewritten > 5
