"""Lower a converted graph to the QDQ form that ONNX Runtime's optimizer fuses.

    linear(x, dequantize(codes [out, in]))     ⇒   matmul(x, dequantize(codesᵀ)) + bias,  or addmm for a matrix x
    adaptive_avg_pool(x, 1)                    ⇒   global_average_pool(x)
    quantize, dequantize (block, format)       ⇒   quantize_linear, dequantize_linear (axis, dtype)

Weights beside float inputs: see `weight_only`; those that no packed kernel takes keep their form.

Every op keeps its name in `meta["custom"]`, so that the exported file can be compared with the graph op by op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphq.errors import TargetError
from graphq.graph.onnx_ops import DEQUANTIZE_LINEAR, GLOBAL_AVERAGE_POOL, QUANTIZE_LINEAR
from graphq.graph.ops import DEQUANTIZE, QUANTIZE, parse_format
from graphq.graph.optable import family_of
from graphq.graph.passes import finish
from graphq.graph.view import parameter, set_parameter, value_of

from .attention import write_out_attention
from .dynamic import lower_dynamic
from .names import NAME, keep_names, product_name
from .residual_sums import separate_sums
from .weight_only import lower_weight_only

aten = torch.ops.aten


def lower_to_onnx_qdq(converted: fx.GraphModule, accuracy_level: int = 0) -> fx.GraphModule:
    """A new graph in ONNX's form that computes the same. accuracy_level: of products with packed weights."""
    gm = keep_names(converted)
    lower_weight_only(gm, accuracy_level)
    lower_dynamic(gm)
    write_out_attention(gm)
    separate_sums(gm)
    for node in list(gm.graph.nodes):
        family, args = family_of(node.target), _args(node)
        if family == "linear" and args[0].target is DEQUANTIZE and args[1].target is DEQUANTIZE:
            linear_to_matmul(gm, node)
        elif family == "adaptive_avg_pool":
            global_average_pool(node)
    to_onnx_form(gm)
    return gm


def _args(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.args)


def linear_to_matmul(gm: fx.GraphModule, node: fx.Node) -> None:
    """Rewrite, in place, a linear with a dequantized weight as a product with its transpose."""
    x, weight, *rest = _args(node)
    bias = rest[0] if rest else node.kwargs.get("bias")
    graph = gm.graph
    with graph.inserting_before(node):
        matrix = _transposed(gm, weight)
        if bias is None:
            result = graph.call_function(aten.matmul.default, (x, matrix))
        elif value_of(x).ndim == 2:
            result = graph.call_function(aten.addmm.default, (bias, x, matrix))
        else:
            product = graph.call_function(aten.matmul.default, (x, matrix))
            product.meta = {**node.meta, "custom": {NAME: product_name(node.name)}}
            result = graph.call_function(aten.add.Tensor, (product, bias))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _transposed(gm: fx.GraphModule, weight: fx.Node) -> fx.Node:
    """dequantize(codes [out, in]) as dequantize(codes [in, out]), in front of the node being rewritten."""
    codes, scale, zero, block, form = _args(weight)
    reads = []
    for read in (codes, scale, zero):
        tensor = parameter(gm, read)
        assert tensor is not None
        turned = tensor.t().contiguous() if tensor.ndim == 2 else tensor
        reads.append(gm.graph.get_attr(set_parameter(gm, f"{read.target}_t", turned)))
        reads[-1].meta = {**read.meta, "val": turned}
    new = gm.graph.call_function(DEQUANTIZE, (*reads, list(reversed(block)), form))
    new.meta = dict(weight.meta)
    new.meta["val"] = value_of(weight).t()
    return new


def global_average_pool(node: fx.Node) -> None:
    """Adaptive pooling to one position, by ONNX's name; other sizes stay as they are."""
    if set(node.args[1]) == {1}:  # type: ignore[arg-type]
        node.target, node.args = GLOBAL_AVERAGE_POOL, (node.args[0],)


def to_onnx_form(gm: fx.GraphModule) -> None:
    """Rewrite, in place, every quantize and dequantize as ONNX's QuantizeLinear and DequantizeLinear."""
    gm.graph.eliminate_dead_code()
    for node in list(gm.graph.nodes):
        if node.target in (QUANTIZE, DEQUANTIZE):
            _to_onnx_form(gm, node)
    finish(gm)


def _to_onnx_form(gm: fx.GraphModule, node: fx.Node) -> None:
    source, scale, zero, block, form = _args(node)
    axis = _axis(node, block)
    fmt, _ = parse_format(form)
    with gm.graph.inserting_before(node):
        flat_scale = flat_parameter(gm, scale, torch.float32, "onnx_scale")
        flat_zero = flat_parameter(gm, zero, fmt.storage, "onnx_zero_point")
        if node.target is QUANTIZE:
            new = gm.graph.call_function(QUANTIZE_LINEAR, (source, flat_scale, flat_zero))
        else:
            new = gm.graph.call_function(DEQUANTIZE_LINEAR, (source, flat_scale, flat_zero, axis))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def _axis(node: fx.Node, block: list[int]) -> int:
    """The one axis along which scales differ; 0 for a scale per tensor."""
    if not block:
        return 0
    axes = [d for d, b in enumerate(block) if b != -1]
    if len(axes) != 1 or block[axes[0]] != 1:
        raise TargetError(
            f"a scale per block {list(block)} has no lowering to ONNX yet",
            where=node.name,
            remedy="Use granularity 'tensor' or 'channel' for models that are exported.",
        )
    return axes[0]


def flat_parameter(gm: fx.GraphModule, read: fx.Node, dtype: torch.dtype, leaf: str) -> fx.Node:
    """The scale or zero point as ONNX wants it: a scalar or a vector, in that dtype."""
    tensor = parameter(gm, read)
    assert isinstance(tensor, Tensor)
    flat = (tensor.reshape(-1) if tensor.ndim else tensor).to(dtype)
    owner = str(read.target).rpartition(".")[0]
    node = gm.graph.get_attr(set_parameter(gm, f"{owner}.{leaf}", flat))
    node.meta = {"val": flat, "custom": dict(read.meta.get("custom", {}))}
    return node
