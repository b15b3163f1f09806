"""Biases as the kernel adds them: int32 codes with scale = input scale · weight scale, zero point 0."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphq.graph.decision import decision_of
from graphq.graph.ops import DEQUANTIZE
from graphq.graph.view import parameter, set_parameter
from graphq.quantizer import TensorQuantizer

LARGEST = 2**30  # leaves as much room again in int32 for the sum of products


def least_weight_scale(bias: Tensor, input_scale: Tensor) -> Tensor:
    """The smallest weight scale [out] at which the codes of this bias fit into int32 with room for the sum."""
    return bias.abs() / (input_scale * LARGEST)


def quantize_bias(gm: fx.GraphModule) -> None:
    """Replace float biases by int32 codes and a dequantize, where the kernel adds them as integers."""
    for node in list(gm.graph.nodes):
        decision = decision_of(node)
        if decision is None or decision.action != "quantize" or decision.bias is None:
            continue
        bias = parameter(gm, decision.bias)
        if decision.bias_form != "int32" or bias is None:
            continue
        sources = [a for a in node.all_input_nodes if a.op == "call_module"]
        x, w = (gm.get_submodule(str(s.target)) for s in sources[:2])
        assert isinstance(x, TensorQuantizer) and isinstance(w, TensorQuantizer)
        scale = (x.qparams[0] * w.qparams[0].reshape(-1)).reshape(-1)
        codes = torch.round(bias.detach().double() / scale.double()).clamp(-(2**31), 2**31 - 1).to(torch.int32)
        block = (1,) if len(scale) > 1 else ()
        name = f"quantizers.{node.name}_bias"
        zero = torch.zeros_like(scale, dtype=torch.int32)
        gm.add_submodule(name, torch.nn.Module())
        values = {"codes": codes, "scale": scale if block else scale[0], "zero_point": zero if block else zero[0]}
        reads = []
        with gm.graph.inserting_before(node):
            for key, value in values.items():
                reads.append(gm.graph.get_attr(set_parameter(gm, f"{name}.{key}", value)))
                reads[-1].meta = {"val": value}
            dequantized = gm.graph.call_function(DEQUANTIZE, (*reads, list(block), "int32"))
        dequantized.meta = {"val": bias}
        node.replace_input_with(decision.bias, dequantized)
