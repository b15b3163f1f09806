"""Lower linears and LSTMs whose inputs are quantized at run time to the kernels that find the scale themselves.

linear(dequantize(quantize(x, choose_qparams(x))), dequantize(codes [out, in]))
    ⇒   dynamic_qgemm(x, codesᵀ, …), or with a scale for every token token_qgemm(x, codesᵀ, …)
lstm(the like, the like, dequantize(codes of the state), …)
    ⇒   dynamic_lstm(x, …)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphq.graph.decision import decision_of
from graphq.graph.dynamic_ops import DYNAMIC_QGEMM, TOKEN_QGEMM
from graphq.graph.integer_ops import REPLACES
from graphq.graph.ops import DEQUANTIZE, QUANTIZE, parse_format
from graphq.graph.recurrent_ops import DYNAMIC_LSTM, TO_ONNX, reorder
from graphq.graph.view import LayerView, parameter, set_parameter

from .names import NAME, product_name


def lower_dynamic(gm: fx.GraphModule) -> None:
    """Rewrite, in place, every op that was decided to run on such a kernel."""
    for node in list(gm.graph.nodes):
        decision = decision_of(node)
        if decision is None or decision.kernel not in BUILDERS or decision.action != "quantize":
            continue
        target, args, bias = BUILDERS[decision.kernel](gm, node)
        name = node.name if bias is None else product_name(node.name)
        with gm.graph.inserting_before(node):
            new = product = gm.graph.call_function(target, args)
            if bias is not None:
                new = gm.graph.call_function(torch.ops.aten.add.Tensor, (product, bias))
        new.meta = {**node.meta, REPLACES: node.name}
        product.meta = {**node.meta, REPLACES: name, "custom": {NAME: name}}
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()


def _float_of(x: fx.Node) -> Any:
    """The tensor that is quantized and dequantized."""
    assert x.target is DEQUANTIZE and isinstance(x.args[0], fx.Node) and x.args[0].target is QUANTIZE
    return x.args[0].args[0]


Built = tuple[Any, tuple[Any, ...], fx.Node | None]  # the op, its arguments, a bias that is added behind it


def _linear(gm: fx.GraphModule, node: fx.Node) -> Built:
    x, weight, bias = (LayerView(gm, node).arg(k) for k in ("input", "weight", "bias"))
    return DYNAMIC_QGEMM, (_float_of(x), *_transposed(gm, weight), bias), None


def _per_token(gm: fx.GraphModule, node: fx.Node) -> Built:
    x, weight, bias = (LayerView(gm, node).arg(k) for k in ("input", "weight", "bias"))
    kind = x.args[1].args[0].args[3]  # of the choose_qparams that finds the scale
    steps = 127.5 if kind.endswith("full") else 127.0
    return TOKEN_QGEMM, (_float_of(x), *_transposed(gm, weight), steps), bias


def _lstm(gm: fx.GraphModule, node: fx.Node) -> Built:
    view, names = LayerView(gm, node), ("x", "weight", "recurrent", "bias", "h", "c", "reverse")
    x, weight, recurrent, bias, *others = (view.arg(name) for name in names)
    gates = (*_gates(gm, weight), *_gates(gm, recurrent), _reordered(gm, bias))
    return DYNAMIC_LSTM, (_float_of(x), *gates, *others), None


def _constant(gm: fx.GraphModule, before: fx.Node, name: str, tensor: Tensor) -> fx.Node:
    with gm.graph.inserting_before(before):
        node = gm.graph.get_attr(set_parameter(gm, name, tensor))
    node.meta = {"val": tensor}
    return node


def _weight(gm: fx.GraphModule, weight: fx.Node) -> tuple[Tensor, Tensor, Tensor, str]:
    """(codes [out, in], scale and zero point [] or [out], where they live) of a dequantized weight."""
    assert weight.target is DEQUANTIZE
    codes, scale, zero = (parameter(gm, a) for a in weight.args[:3])  # type: ignore[arg-type]
    assert codes is not None and scale is not None and zero is not None
    storage: torch.dtype = parse_format(str(weight.args[4]))[0].storage
    flat = scale.reshape(-1) if scale.ndim else scale
    return codes, flat.float(), zero.reshape(flat.shape).to(storage), str(weight.args[0].target).rpartition(".")[0]  # type: ignore[union-attr]


def _transposed(gm: fx.GraphModule, weight: fx.Node) -> list[fx.Node]:
    """Codes [in, out], scale and zero point, [] or [out], in front of the dequantize node of a weight."""
    codes, scale, zero, base = _weight(gm, weight)
    values = {"transposed": codes.t().contiguous(), "column_scale": scale, "column_zero": zero}
    return [_constant(gm, weight, f"{base}.{leaf}", tensor) for leaf, tensor in values.items()]


def _gates(gm: fx.GraphModule, weight: fx.Node) -> list[fx.Node]:
    """As _transposed, with the gates in ONNX's order, a scale for each column, and unsigned codes: pairs of products
    of these do not saturate on x86, and cost nothing more."""
    codes, scale, zero, base = _weight(gm, weight)
    shift = 128 if codes.dtype == torch.int8 else 0
    unsigned = [(v.to(torch.int32) + shift).to(torch.uint8) for v in (codes, zero)]
    columns = [v.expand(len(codes)) for v in (scale, unsigned[1])]
    values = {
        "gates": reorder(unsigned[0], TO_ONNX).t().contiguous(),
        "column_scale": reorder(columns[0], TO_ONNX),
        "column_zero": reorder(columns[1], TO_ONNX),
    }
    return [_constant(gm, weight, f"{base}.{leaf}", tensor) for leaf, tensor in values.items()]


def _reordered(gm: fx.GraphModule, bias: fx.Node | None) -> fx.Node | None:
    values = parameter(gm, bias)
    if bias is None or values is None:
        return None
    return _constant(gm, bias, f"{bias.target}_onnx", reorder(values.detach(), TO_ONNX))


BUILDERS = {"DynamicQuantizeMatMul": _linear, "MatMulInteger": _per_token, "DynamicQuantizeLSTM": _lstm}
