"""Blocks of activations whose scales are found at run time (NVFP4, MXFP8), and MXFP8 weights, for TensorRT's own ops.

dequantize(quantize(x, choose_qparams(x)))    ⇒   dynamic_blocks(x)
dequantize(fp8 codes, E8M0 scales)            ⇒   mxfp8_weight(codes, exponents)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphq.graph.block_ops import DYNAMIC_BLOCKS, MXFP8_WEIGHT
from graphq.graph.ops import CHOOSE_QPARAMS, DEQUANTIZE, QUANTIZE, parse_format
from graphq.graph.view import parameter, set_parameter
from graphq.numerics.scales import TWO_LEVEL, units


def write_dynamic_blocks(gm: fx.GraphModule) -> None:
    """Rewrite, in place, every tensor that is quantized in blocks at run time."""
    for node in gm.graph.find_nodes(op="call_function", target=DEQUANTIZE):
        codes, scale = node.args[:2]
        chosen: Any = next(iter(scale.args), None)  # of a getitem
        if codes.target is not QUANTIZE or getattr(chosen, "target", None) is not CHOOSE_QPARAMS:
            continue
        x, block, form, kind, overall = chosen.args
        if not block:
            continue
        unit, of_kind = None, kind.split()[1]
        if of_kind in TWO_LEVEL:
            largest = parameter(gm, overall)
            assert largest is not None
            unit = _read(gm, node, f"{overall.target}_scale", 1 / units(largest, parse_format(form)[0], of_kind))
        _replace(gm, node, DYNAMIC_BLOCKS, (x, overall, unit, block, form, kind))


def write_mxfp8_weights(gm: fx.GraphModule) -> None:
    """Rewrite, in place, every weight of fp8 codes with E8M0 scales."""
    for node in gm.graph.find_nodes(op="call_function", target=DEQUANTIZE):
        codes, scale, _, block, form = node.args
        values = parameter(gm, scale)
        if form != "fp8_e4m3:e8m0" or values is None or parameter(gm, codes) is None:
            continue
        exponents = (torch.frexp(values).exponent + 126).to(torch.uint8)
        read = _read(gm, node, f"{scale.target}_exponents", exponents)
        _replace(gm, node, MXFP8_WEIGHT, (codes, read, block))


def _read(gm: fx.GraphModule, before: fx.Node, name: str, tensor: Tensor) -> fx.Node:
    with gm.graph.inserting_before(before):
        node = gm.graph.get_attr(set_parameter(gm, name, tensor))
    node.meta = {"val": tensor}
    return node


def _replace(gm: fx.GraphModule, old: fx.Node, target: object, args: tuple[object, ...]) -> None:
    with gm.graph.inserting_before(old):
        new = gm.graph.call_function(target, args)  # type: ignore[arg-type]
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    gm.graph.erase_node(old)
