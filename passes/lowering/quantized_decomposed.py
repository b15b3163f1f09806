"""Lower a converted graph to the ops whose patterns Inductor's x86 backend knows.

    quantize, dequantize (scale per tensor)       ⇒   quantized_decomposed.(de)quantize_per_tensor, numbers as arguments
    dequantize(codes) (scale per channel)         ⇒   quantized_decomposed.dequantize_per_channel
    dequantize ── pad(0)                          ⇒   pad(zero point) ── dequantize

Every reader gets a dequantize of its own: a kernel takes in only one that it alone reads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers the ops
from torch import fx

from graphq.errors import TargetError
from graphq.graph.ops import DEQUANTIZE, QUANTIZE, parse_format
from graphq.graph.optable import family_of
from graphq.graph.passes import finish
from graphq.graph.view import LayerView, parameter, set_parameter

from .names import NAME, keep_names

DECOMPOSED = torch.ops.quantized_decomposed


def lower_to_quantized_decomposed(converted: fx.GraphModule) -> fx.GraphModule:
    """A new graph that computes the same, in ops of torch alone. Raises TargetError for scales per group."""
    gm = keep_names(converted)
    for node in list(gm.graph.nodes):
        if family_of(node.target) == "pad" and node.args[0].target is DEQUANTIZE:
            _pad_codes(gm, node)
    gm.graph.eliminate_dead_code()
    for node in list(gm.graph.nodes):
        if node.target in (QUANTIZE, DEQUANTIZE):
            _lower(gm, node)
    gm.graph.eliminate_dead_code()
    finish(gm)
    return gm


def _pad_codes(gm: fx.GraphModule, pad: fx.Node) -> None:
    """Zeros around a dequantized tensor are its zero point around the codes; kernels take in only the dequantize."""
    dequantize = pad.args[0]
    assert isinstance(dequantize, fx.Node)
    codes, scale, zero, block, form = dequantize.args
    point, view = parameter(gm, zero), LayerView(gm, pad)  # type: ignore[arg-type]
    if (
        block
        or point is None
        or (view.arg("mode") or "constant") != "constant"
        or view.arg("value") not in (None, 0, 0.0)
    ):
        return
    with gm.graph.inserting_before(pad):
        padded = gm.graph.call_function(torch.ops.aten.constant_pad_nd.default, (codes, pad.args[1], int(point)))
        new = gm.graph.call_function(DEQUANTIZE, (padded, scale, zero, block, form))
    padded.meta, new.meta = {"custom": {NAME: dequantize.name}}, dict(pad.meta)
    pad.replace_all_uses_with(new)
    gm.graph.erase_node(pad)


def _lower(gm: fx.GraphModule, node: fx.Node) -> None:
    source, _, _, block, form = node.args
    with gm.graph.inserting_before(node):
        target, numbers = _per_axis(gm, node) if block else _per_tensor(gm, node)
    fmt, narrow = parse_format(str(form))
    low, high = fmt.limits(narrow)
    args = (source, *numbers, int(low), int(high), fmt.storage)
    readers = list(node.users) if node.target is DEQUANTIZE else [None]
    for reader in readers:
        with gm.graph.inserting_before(reader or node):
            new = gm.graph.call_function(target, args)
        new.meta = dict(node.meta)
        if reader is None:
            node.replace_all_uses_with(new)
        else:
            reader.replace_input_with(node, new)
    gm.graph.erase_node(node)


def _per_tensor(gm: fx.GraphModule, node: fx.Node) -> tuple[Any, tuple[float, int]]:
    scale, zero = (parameter(gm, a) for a in node.args[1:3])  # type: ignore[arg-type]
    if scale is None or zero is None:
        raise TargetError(
            "a scale that is found at run time has no kernel here", where=node.name, remedy="dynamic: false."
        )
    op = DECOMPOSED.quantize_per_tensor if node.target is QUANTIZE else DECOMPOSED.dequantize_per_tensor
    return op.default, (float(scale), int(zero))


def _per_axis(gm: fx.GraphModule, node: fx.Node) -> tuple[Any, tuple[fx.Node, fx.Node, int]]:
    _, scale, zero, block, _ = node.args
    axes = [d for d, b in enumerate(block) if b != -1]  # type: ignore[arg-type]
    if node.target is QUANTIZE or len(axes) != 1 or block[axes[0]] != 1:  # type: ignore[index]
        raise TargetError(
            f"a scale per block {block} has no kernel in torch.compile",
            where=node.name,
            remedy="Use granularity channel.",
        )
    reads = []
    for leaf, read, dtype in (("flat_scale", scale, torch.float32), ("flat_zero", zero, torch.int64)):
        tensor = parameter(gm, read)  # type: ignore[arg-type]
        assert tensor is not None
        name = f"{str(read.target).rpartition('.')[0]}.{leaf}"  # type: ignore[union-attr]
        flat = tensor.reshape(-1).to(dtype)
        reads.append(gm.graph.get_attr(set_parameter(gm, name, flat)))
        reads[-1].meta = {"val": flat}
    return DECOMPOSED.dequantize_per_channel.default, (reads[0], reads[1], axes[0])
