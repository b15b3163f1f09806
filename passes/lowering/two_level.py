"""Write block scales in units of a scale per tensor (NVFP4) as they are: fp8 codes, and one float.

    dequantize(codes, scales)   ⇒   dequantize(codes, dequantize(fp8 scales, scale of the tensor))

Twice dequantized is how ONNX, and TensorRT, says it. A scale is then a product where it was a quotient: the last bit
may differ.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphq.graph.decision import decision_of
from graphq.graph.ops import DEQUANTIZE, OVERALL, parse_format
from graphq.graph.view import parameter, set_parameter
from graphq.numerics.affine import quantize
from graphq.numerics.scales import TWO_LEVEL, units

KIND, FORM = "e4m3", "fp8_e4m3"


def split_block_scales(gm: fx.GraphModule) -> None:
    """Rewrite, in place, the scales of every weight whose spec has such scales."""
    for node in list(gm.graph.nodes):
        if node.target is not DEQUANTIZE or not any(_two_level(user) for user in node.users):
            continue
        codes, scale, *rest = node.args
        tensor, overall = parameter(gm, scale), scale.meta.get(OVERALL)
        if tensor is None or overall is None or parameter(gm, codes) is None:
            continue
        unit = units(overall, parse_format(str(rest[-1]))[0], KIND)
        node.args = (codes, _in_units(gm, node, scale, tensor, unit), *rest)


def _two_level(node: fx.Node) -> bool:
    decision = decision_of(node)
    return decision is not None and decision.weight_spec is not None and decision.weight_spec.scale == KIND


def _in_units(gm: fx.GraphModule, node: fx.Node, scale: fx.Node, tensor: Tensor, unit: Tensor) -> fx.Node:
    """A dequantize node that gives the scales."""
    none = torch.zeros_like(unit, dtype=torch.int32)
    codes = quantize(tensor * unit, torch.ones_like(unit), none, (), TWO_LEVEL[KIND][0])
    reads = []
    with gm.graph.inserting_before(node):
        for leaf, value in (("codes", codes), ("unit", 1 / unit), ("zero_point", none)):
            read = gm.graph.get_attr(set_parameter(gm, f"{scale.target}_{leaf}", value))
            read.meta = {"val": value, "custom": dict(scale.meta.get("custom", {}))}
            reads.append(read)
        both = gm.graph.call_function(DEQUANTIZE, (*reads, [], FORM))
    both.meta = {"val": tensor, "custom": dict(scale.meta.get("custom", {}))}
    return both
