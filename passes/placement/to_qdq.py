"""Convert: every quantizer becomes graphq::quantize and graphq::dequantize; constants become codes.

x ── TensorQuantizer ── y        ⇒    x ── quantize ── dequantize ── y
weight ── TensorQuantizer ── y   ⇒    codes ── dequantize ── y

Where the spec is dynamic, choose_qparams gives the scale of every tensor anew.
"""

from __future__ import annotations

import operator

from torch import Tensor, fx

from graphq.graph.fork import own_folder
from graphq.graph.infer import infer
from graphq.graph.ops import AGAIN, CHOOSE_QPARAMS, DEQUANTIZE, OVERALL, QUANTIZE, format_text, kind_text
from graphq.graph.passes import finish
from graphq.graph.view import parameter, set_parameter
from graphq.numerics.affine import quantize
from graphq.numerics.scales import TWO_LEVEL
from graphq.quantizer import TensorQuantizer

from .edges import quantizer_at


def to_qdq(gm: fx.GraphModule) -> None:
    """Replace all TensorQuantizers. Raises StateError for one that has not been calibrated."""
    calls = [n for n in gm.graph.nodes if n.op == "call_module"]
    shared = {str(n.target): quantizer_at(gm, n) for n in calls}
    for name, quantizer in shared.items():
        hold(gm, name, quantizer)
        if quantizer.then is not None:
            hold(gm, f"{name}_then", quantizer.then)
    for node in calls:
        source, quantizer = node.args[0], shared[str(node.target)]
        assert isinstance(source, fx.Node)
        value = _pair(gm, node, source, quantizer, str(node.target))
        if quantizer.then is not None:
            value = _pair(gm, node, value, quantizer.then, f"{node.target}_then", again=True)
        node.replace_all_uses_with(value)
        gm.graph.erase_node(node)
    finish(gm)


def hold(gm: fx.GraphModule, name: str, quantizer: TensorQuantizer) -> None:
    """Keep what a quantizer has calibrated as tensors of the graph, in its place."""
    holder = own_folder(gm, name)
    if quantizer.spec.dynamic:
        holder.register_buffer("overall", quantizer.overall)
    else:
        scale, zero_point = quantizer.qparams
        holder.register_buffer("scale", scale)
        holder.register_buffer("zero_point", zero_point)


def _pair(
    gm: fx.GraphModule, node: fx.Node, source: fx.Node, quantizer: TensorQuantizer, name: str, *, again: bool = False
) -> fx.Node:
    """quantize and dequantize in front of the quantizer's call; of a constant only dequantize, on its codes."""
    block, form = list(quantizer.block), format_text(quantizer.spec)
    constant = parameter(gm, source)
    with gm.graph.inserting_before(node):
        scale, zero = _qparams(gm, source, quantizer, name)
        if constant is not None and not quantizer.spec.dynamic:
            codes_value = quantize(
                constant.detach(),
                *quantizer.qparams,
                quantizer.block,
                quantizer.spec.number_format,
                **quantizer.rounding,
            )
            codes = _read(gm, set_parameter(gm, f"{name}.codes", codes_value), codes_value)
        else:
            codes = gm.graph.call_function(QUANTIZE, (source, scale, zero, block, form))
            codes.meta = {**node.meta, "val": _like(source, quantizer)} | ({AGAIN: True} if again else {})
        value = gm.graph.call_function(DEQUANTIZE, (codes, scale, zero, block, form))
    value.meta = dict(node.meta)
    return value


def _qparams(gm: fx.GraphModule, source: fx.Node, quantizer: TensorQuantizer, name: str) -> tuple[fx.Node, fx.Node]:
    """Scale and zero point: read, or computed from the tensor where the spec is dynamic."""
    spec = quantizer.spec
    if not spec.dynamic:
        scale = _read(gm, f"{name}.scale", quantizer.scale)
        if spec.scale in TWO_LEVEL:
            scale.meta[OVERALL] = quantizer.overall
        return scale, _read(gm, f"{name}.zero_point", quantizer.zero_point)
    overall = _read(gm, f"{name}.overall", quantizer.overall) if quantizer.overall is not None else None
    args = (source, list(quantizer.block), format_text(spec), kind_text(spec), overall)
    both = gm.graph.call_function(CHOOSE_QPARAMS, args)
    parts = [gm.graph.call_function(operator.getitem, (both, i)) for i in range(2)]
    both.meta["val"] = infer(both)
    for part, value in zip(parts, both.meta["val"], strict=True):
        part.meta["val"] = value
    return parts[0], parts[1]


def _like(source: fx.Node, quantizer: TensorQuantizer) -> Tensor | None:
    value = source.meta.get("val")
    return value.to(quantizer.spec.number_format.storage) if isinstance(value, Tensor) else None


def _read(gm: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    node = gm.graph.get_attr(name)
    node.meta = {"val": value}
    return node
