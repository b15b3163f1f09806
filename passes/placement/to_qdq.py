"""Convert: every quantizer becomes graphq::quantize and graphq::dequantize; constants become codes.

x ── TensorQuantizer ── y        ⇒    x ── quantize ── dequantize ── y
weight ── TensorQuantizer ── y   ⇒    codes ── dequantize ── y
"""

from __future__ import annotations

from torch import Tensor, fx

from graphq.graph.fork import own_folder
from graphq.graph.ops import DEQUANTIZE, QUANTIZE
from graphq.graph.passes import finish
from graphq.graph.view import parameter, set_parameter
from graphq.numerics.affine import quantize
from graphq.quantizer import TensorQuantizer

from .edges import quantizer_at


def to_qdq(gm: fx.GraphModule) -> None:
    """Replace all TensorQuantizers. Raises StateError for one that has not been calibrated."""
    calls = [n for n in gm.graph.nodes if n.op == "call_module"]
    shared = {str(n.target): quantizer_at(gm, n) for n in calls}
    for name, quantizer in shared.items():
        scale, zero_point = quantizer.qparams
        holder = own_folder(gm, name)
        holder.register_buffer("scale", scale)
        holder.register_buffer("zero_point", zero_point)
    for node in calls:
        _replace(gm, node, shared[str(node.target)])
    finish(gm)


def _replace(gm: fx.GraphModule, node: fx.Node, quantizer: TensorQuantizer) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    narrow = "!" if quantizer.spec.narrow_range else ""
    block, form = list(quantizer.block), quantizer.spec.format + narrow
    with gm.graph.inserting_before(node):
        scale = _read(gm, f"{node.target}.scale", quantizer.scale)
        zero = _read(gm, f"{node.target}.zero_point", quantizer.zero_point)
        constant = parameter(gm, source)
        if constant is not None:
            codes_value = quantize(
                constant.detach(),
                *quantizer.qparams,
                quantizer.block,
                quantizer.spec.number_format,
                narrow_range=quantizer.spec.narrow_range,
            )
            codes = _read(gm, set_parameter(gm, f"{node.target}.codes", codes_value), codes_value)
        else:
            codes = gm.graph.call_function(QUANTIZE, (source, scale, zero, block, form))
            codes.meta = {**node.meta, "val": _like(source, quantizer)}
        value = gm.graph.call_function(DEQUANTIZE, (codes, scale, zero, block, form))
    value.meta = dict(node.meta)
    node.replace_all_uses_with(value)
    gm.graph.erase_node(node)


def _like(source: fx.Node, quantizer: TensorQuantizer) -> Tensor | None:
    value = source.meta.get("val")
    return value.to(quantizer.spec.number_format.storage) if isinstance(value, Tensor) else None


def _read(gm: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    node = gm.graph.get_attr(name)
    node.meta = {"val": value}
    return node
