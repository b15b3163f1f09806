"""Lower a converted graph to exact integer arithmetic: what the runtime's kernels compute, bit for bit.

    dequantize ── conv (── relu | clip) ── quantize     ⇒   qconv
    dequantize ── linear (── quantize)                  ⇒   qgemm (── add of a float bias)
    dequantize ── matmul (── quantize)                  ⇒   qmatmul
    dequantize ── add (── relu | clip) ── quantize      ⇒   qadd
    dequantize ── global average pool ── quantize       ⇒   qaverage_pool
    dequantize ── mul, sigmoid, leaky_relu, cat, where, softmax, avg_pool ── quantize   ⇒   qmul, qsigmoid, …
    linear, embedding with packed weights               ⇒   matmul_nbits, gather_nbits (see `weight_only`)

Everything else stays as it is. `verify` runs this graph against the runtime.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphq.graph.decision import Decision, decision_of
from graphq.graph.dynamic_ops import DYNAMIC_QGEMM, TOKEN_QGEMM
from graphq.graph.elementwise_ops import QAVG_POOL, QCAT, QLEAKY_RELU, QMUL, QSIGMOID, QSOFTMAX, QWHERE
from graphq.graph.fork import fork
from graphq.graph.integer_ops import QADD, QAVERAGE_POOL, QCONV, QGEMM, QMATMUL, REPLACES
from graphq.graph.ops import DEQUANTIZE, QUANTIZE
from graphq.graph.passes import finish
from graphq.graph.view import LayerView, value_of

from .dynamic import lower_dynamic
from .names import product_name
from .weight_only import lower_weight_only


def lower_to_integer_reference(
    converted: fx.GraphModule, accuracy_level: int = 0, saturating: bool = False
) -> fx.GraphModule:
    """A new graph; quantized tensors keep the names of their quantize nodes. saturating: with the int16 sums of x86
    without VNNI."""
    gm = fork(converted)
    lower_weight_only(gm, accuracy_level)
    lower_dynamic(gm)
    for node in list(gm.graph.nodes):
        decision = decision_of(node)
        if decision is None or decision.action != "quantize":
            continue
        build = BUILDERS.get(decision.kernel)
        root = decision.members[0]
        quantize = next((u for u in root.users if u.target is QUANTIZE), None)
        if build is not None and (quantize is not None or decision.kernel in FLOAT_RESULT):
            build(gm, node, decision, quantize)
    for node in gm.graph.nodes if saturating else ():
        if node.target in SATURATING:
            node.kwargs = {"saturating": True}
    finish(gm)
    return gm


def _codes(dequantize: Any) -> tuple[Any, Any, Any]:
    """(codes, scale, zero point) behind a dequantize node."""
    assert isinstance(dequantize, fx.Node) and dequantize.target is DEQUANTIZE, dequantize
    return dequantize.args[:3]  # type: ignore[return-value]


def _swap(gm: fx.GraphModule, old: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    with gm.graph.inserting_before(old):
        new = gm.graph.call_function(target, args)
    new.meta = dict(old.meta)
    new.meta[REPLACES] = old.name
    old.replace_all_uses_with(new)
    gm.graph.erase_node(old)


def _conv(gm: fx.GraphModule, node: fx.Node, decision: Decision, quantize: fx.Node) -> None:
    view = LayerView(gm, node)
    x, weight, bias = (view.arg(k) for k in ("input", "weight", "bias"))
    outer: list[int] = []
    if x.target is not DEQUANTIZE:
        outer, x = list(x.args[1]), x.args[0]
    w = _codes(weight)
    _, y_scale, y_zero, _, form = quantize.args
    shape = [list(view.arg(k)) for k in ("stride", "padding", "dilation")]
    added = None if bias is None else _codes(bias)[0]
    _swap(gm, quantize, QCONV, (*_codes(x), *w, added, y_scale, y_zero, form, *shape, view.arg("groups"), outer))


def _gemm(gm: fx.GraphModule, node: fx.Node, decision: Decision, quantize: fx.Node | None) -> None:
    view = LayerView(gm, node)
    bias = view.arg("bias")
    added = None if bias is None else _codes(bias)[0]
    operands = (*_codes(view.arg("input")), *_codes(view.arg("weight")), added)
    if quantize is None:
        _swap(gm, node, QGEMM, (*operands, None, None, "uint8"))
    else:
        _, y_scale, y_zero, _, form = quantize.args
        _swap(gm, quantize, QGEMM, (*operands, y_scale, y_zero, form))


def _matmul(gm: fx.GraphModule, node: fx.Node, decision: Decision, quantize: fx.Node | None) -> None:
    """MatMulIntegerToFloat, QLinearMatMul; a bias is added behind it in float."""
    view = LayerView(gm, node)
    if view.family != "linear":
        both = (*_codes(node.args[0]), *_codes(node.args[1]))
        if decision.kernel == "QLinearMatMul" and quantize is not None:
            _swap(gm, quantize, QMATMUL, (*both, *_result(quantize)))
        else:
            _swap(gm, node, QMATMUL, (*both, None, None, "uint8"))
        return
    operands = (*_codes(view.arg("input")), *_codes(view.arg("weight")), None, None, None, "uint8")
    bias = view.arg("bias")
    if bias is None:
        _swap(gm, node, QGEMM, operands)
        return
    with gm.graph.inserting_before(node):
        product = gm.graph.call_function(QGEMM, operands)
    product.meta = {**node.meta, REPLACES: product_name(node.name)}
    _swap(gm, node, torch.ops.aten.add.Tensor, (product, bias))


def _result(quantize: fx.Node) -> tuple[Any, Any, Any]:
    """(scale, zero point, format) of what a quantize node makes."""
    _, scale, zero, _, form = quantize.args
    return scale, zero, form


def _of_two(target: Any) -> Any:
    """The builder of a kernel for two tensors."""

    def build(gm: fx.GraphModule, node: fx.Node, decision: Decision, quantize: fx.Node) -> None:
        _swap(gm, quantize, target, (*_codes(node.args[0]), *_codes(node.args[1]), *_result(quantize)))

    return build


def _of_one(target: Any) -> Any:
    """The builder of a kernel for one tensor."""

    def build(gm: fx.GraphModule, node: fx.Node, decision: Decision, quantize: fx.Node) -> None:
        _swap(gm, quantize, target, (*_codes(node.args[0]), *_result(quantize)))

    return build


def _leaky_relu(gm: fx.GraphModule, node: fx.Node, decision: Decision, quantize: fx.Node) -> None:
    slope = float(LayerView(gm, node).arg("negative_slope"))
    _swap(gm, quantize, QLEAKY_RELU, (*_codes(node.args[0]), *_result(quantize), slope))


def _cat(gm: fx.GraphModule, node: fx.Node, decision: Decision, quantize: fx.Node) -> None:
    view = LayerView(gm, node)
    codes, scales, zeros = zip(*(_codes(t) for t in view.arg("tensors")), strict=True)
    args = (list(codes), list(scales), list(zeros), *_result(quantize), int(view.arg("dim")))
    _swap(gm, quantize, QCAT, args)


def _where(gm: fx.GraphModule, node: fx.Node, decision: Decision, quantize: fx.Node) -> None:
    condition, a, b = node.args
    _swap(gm, quantize, QWHERE, (condition, *_codes(a), *_codes(b), *_result(quantize)))


def _avg_pool(gm: fx.GraphModule, node: fx.Node, decision: Decision, quantize: fx.Node) -> None:
    """Windows that reach beyond the padding are counted otherwise by ONNX: those stay float."""
    view = LayerView(gm, node)
    if view.arg("ceil_mode") or view.arg("divisor_override") is not None:
        return
    kernel, stride, padding = (view.arg(k) for k in ("kernel_size", "stride", "padding"))
    rank = value_of(node).ndim - 2
    shape = [list(p) * (rank if len(p) == 1 else 1) for p in (kernel, stride or kernel, padding)]
    args = (*_codes(node.args[0]), *_result(quantize), *shape, bool(view.arg("count_include_pad")))
    _swap(gm, quantize, QAVG_POOL, args)


SATURATING = (QCONV, QGEMM, DYNAMIC_QGEMM, TOKEN_QGEMM)
FLOAT_RESULT = ("QGemm", "MatMulIntegerToFloat")  # kernels that can do without a Q behind them

BUILDERS: dict[str, Any] = {
    "QLinearConv": _conv,
    "QGemm": _gemm,
    "MatMulIntegerToFloat": _matmul,
    "QLinearMatMul": _matmul,
    "QLinearAdd": _of_two(QADD),
    "QLinearMul": _of_two(QMUL),
    "QLinearGlobalAveragePool": _of_one(QAVERAGE_POOL),
    "QLinearSigmoid": _of_one(QSIGMOID),
    "QLinearSoftmax": _of_one(QSOFTMAX),
    "QLinearLeakyRelu": _leaky_relu,
    "QLinearConcat": _cat,
    "QLinearAveragePool": _avg_pool,
    "QLinearWhere": _where,
}
