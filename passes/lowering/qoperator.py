"""Lower a converted graph to integer kernels as the nodes of its file: QLinearConv, QGemm, QLinearAdd, …

The graph is that of `integer_reference`, which `verify` runs; here its ops get operands as ONNX wants them: scales and
zero points that are scalars or vectors, zero points in the dtype of their codes. What has no integer op there keeps its
Q and DQ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphq.graph.elementwise_ops import QAVG_POOL, QCAT, QLEAKY_RELU, QMUL, QSIGMOID, QSOFTMAX, QWHERE
from graphq.graph.integer_ops import QADD, QAVERAGE_POOL, QCONV, QGEMM, QMATMUL, name_in_file
from graphq.graph.ops import parse_format
from graphq.graph.optable import family_of
from graphq.graph.view import parameter, value_of

from .attention import write_out_attention
from .integer_reference import lower_to_integer_reference
from .names import NAME
from .onnx_qdq import flat_parameter, global_average_pool, to_onnx_form
from .residual_sums import separate_sums

# op → (position of codes, of their scale, of their zero point); codes None: of the result, in the format that follows
OPERANDS: dict[object, list[tuple[int | None, int, int]]] = {
    QCONV: [(0, 1, 2), (3, 4, 5), (None, 7, 8)],
    QGEMM: [(0, 1, 2), (3, 4, 5), (None, 7, 8)],
    QMATMUL: [(0, 1, 2), (3, 4, 5), (None, 6, 7)],
    QADD: [(0, 1, 2), (3, 4, 5), (None, 6, 7)],
    QMUL: [(0, 1, 2), (3, 4, 5), (None, 6, 7)],
    QWHERE: [(1, 2, 3), (4, 5, 6), (None, 7, 8)],
    QCAT: [(0, 1, 2), (None, 3, 4)],
    **{op: [(0, 1, 2), (None, 3, 4)] for op in (QAVERAGE_POOL, QAVG_POOL, QSIGMOID, QLEAKY_RELU, QSOFTMAX)},
}


def lower_to_onnx_qoperator(converted: fx.GraphModule, accuracy_level: int = 0) -> fx.GraphModule:
    """A new graph in ONNX's form that computes the same. accuracy_level: of products with packed weights."""
    gm = lower_to_integer_reference(converted, accuracy_level)
    write_out_attention(gm)
    separate_sums(gm)
    for node in gm.graph.nodes:
        node.meta["custom"] = {NAME: name_in_file(node)}
    for node in list(gm.graph.nodes):
        if node.target in OPERANDS:
            _type_operands(gm, node)
        elif family_of(node.target) == "adaptive_avg_pool":
            global_average_pool(node)
    to_onnx_form(gm)
    return gm


def _type_operands(gm: fx.GraphModule, node: fx.Node) -> None:
    args = list(node.args)
    with gm.graph.inserting_before(node):
        for codes, scale, zero in OPERANDS[node.target]:
            if args[scale] is None:
                continue  # a float result
            storage = parse_format(str(args[zero + 1]))[0].storage if codes is None else _dtype(gm, args[codes])
            args[scale] = _flat(gm, args[scale], torch.float32, "onnx_scale")
            args[zero] = _flat(gm, args[zero], storage, "onnx_zero_point")
    node.args = tuple(args)


def _flat(gm: fx.GraphModule, reads: Any, dtype: torch.dtype, leaf: str) -> Any:
    if isinstance(reads, (list, tuple)):  # an operand for each tensor of a concatenation
        return [flat_parameter(gm, r, dtype, leaf) for r in reads]
    return flat_parameter(gm, reads, dtype, leaf)


def _dtype(gm: fx.GraphModule, codes: Any) -> torch.dtype:
    codes = codes[0] if isinstance(codes, (list, tuple)) else codes
    assert isinstance(codes, fx.Node)
    tensor = parameter(gm, codes)
    value = value_of(codes) if tensor is None else tensor
    return value.dtype  # type: ignore[no-any-return]
