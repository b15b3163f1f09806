"""Biases as the kernel adds them: int32 codes with scale = input scale · weight scale, zero point 0."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from graphq.graph.decision import Decision, decision_of
from graphq.graph.ops import DEQUANTIZE
from graphq.graph.view import parameter, set_parameter
from graphq.quantizer import TensorQuantizer

from .edges import quantizer_at, quantizer_calls

LARGEST = 2**30  # leaves as much room again in int32 for the sum of products

Biased = tuple[fx.Node, Decision, Tensor, TensorQuantizer, TensorQuantizer]


def _integer_biases(gm: fx.GraphModule) -> Iterator[Biased]:
    """(op, decision, bias [out], input quantizer, weight quantizer) of ops whose kernels add the bias as integers."""
    for node in list(gm.graph.nodes):
        decision = decision_of(node)
        if decision is None or decision.action != "quantize" or decision.bias_form != "int32":
            continue
        bias = parameter(gm, decision.bias)
        inputs, weight = quantizer_calls(decision)
        if bias is not None and weight is not None and inputs:
            yield node, decision, bias.detach(), quantizer_at(gm, inputs[0]), quantizer_at(gm, weight)


def fit_bias(gm: fx.GraphModule) -> None:
    """Grow weight scales that are so small that the bias codes would overflow int32 (dead channels)."""
    for _, _, bias, x, w in _integer_biases(gm):
        least = bias.abs() / (x.scale * LARGEST)
        w.scale = torch.maximum(w.scale, least.reshape(w.scale.shape) if w.block else least.max())


def quantize_bias(gm: fx.GraphModule) -> None:
    """Replace float biases by int32 codes and a dequantize, where the kernel adds them as integers."""
    for node, decision, bias, x, w in _integer_biases(gm):
        assert decision.bias is not None
        scale = x.qparams[0] * w.qparams[0].reshape(-1)
        scale = scale if w.block else scale[0]
        codes = torch.round(bias.double() / scale.double()).clamp(-(2**31), 2**31 - 1).to(torch.int32)
        values = {"codes": codes, "scale": scale, "zero_point": torch.zeros_like(scale, dtype=torch.int32)}
        folder = f"quantizers.{node.name}_bias"
        gm.add_submodule(folder, torch.nn.Module())
        with gm.graph.inserting_before(node):
            reads = [gm.graph.get_attr(set_parameter(gm, f"{folder}.{k}", v)) for k, v in values.items()]
            block = [1] if scale.ndim else []
            dequantized = gm.graph.call_function(DEQUANTIZE, (*reads, block, "int32"))
        for read, value in zip(reads, values.values(), strict=True):
            read.meta = {"val": value}
        dequantized.meta = {"val": bias}
        node.replace_input_with(decision.bias, dequantized)
