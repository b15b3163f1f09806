"""Convert: every quantizer becomes graphq::quantize and graphq::dequantize; constants become codes.

    x ── TensorQuantizer ── y        ⇒    x ── quantize ── dequantize ── y
    weight ── TensorQuantizer ── y   ⇒    codes ── dequantize ── y
"""

from __future__ import annotations

from torch import Tensor, fx

from graphq.graph.ops import DEQUANTIZE, QUANTIZE
from graphq.graph.passes import finish
from graphq.graph.view import parameter, set_parameter
from graphq.numerics.affine import quantize
from graphq.quantizer import TensorQuantizer


def to_qdq(gm: fx.GraphModule) -> None:
    """Replace all TensorQuantizers. Raises StateError for one that has not been calibrated."""
    for node in list(gm.graph.nodes):
        if node.op != "call_module":
            continue
        quantizer = gm.get_submodule(str(node.target))
        assert isinstance(quantizer, TensorQuantizer)
        quantizer.qparams  # noqa: B018  (raises before anything has changed for this quantizer)
        _replace(gm, node, quantizer)
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
