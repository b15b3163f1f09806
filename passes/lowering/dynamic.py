"""Lower linears whose inputs are quantized at run time to the kernel that finds the scale itself.

linear(dequantize(quantize(x, choose_qparams(x))), dequantize(codes [out, in]))    ⇒    dynamic_qgemm(x, codesᵀ, …)
"""

from __future__ import annotations

import torch
from torch import fx

from graphq.graph.decision import decision_of
from graphq.graph.dynamic_ops import DYNAMIC_QGEMM
from graphq.graph.integer_ops import REPLACES
from graphq.graph.ops import DEQUANTIZE, QUANTIZE, parse_format
from graphq.graph.view import LayerView, parameter, set_parameter


def lower_dynamic(gm: fx.GraphModule) -> None:
    """Rewrite, in place, every op that was decided to run on such a kernel."""
    for node in list(gm.graph.nodes):
        decision = decision_of(node)
        if decision is None or decision.kernel != "DynamicQuantizeMatMul" or decision.action != "quantize":
            continue
        view = LayerView(gm, node)
        x, weight, bias = (view.arg(k) for k in ("input", "weight", "bias"))
        assert x.target is DEQUANTIZE and x.args[0].target is QUANTIZE and weight.target is DEQUANTIZE
        reads = _transposed(gm, weight)
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(DYNAMIC_QGEMM, (x.args[0].args[0], *reads, bias))
        new.meta = {**node.meta, REPLACES: node.name}
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()


def _transposed(gm: fx.GraphModule, weight: fx.Node) -> list[fx.Node]:
    """Codes [in, out], scale and zero point, [] or [out], in front of the dequantize node of a weight."""
    codes, scale, zero = (parameter(gm, a) for a in weight.args[:3])  # type: ignore[arg-type]
    assert codes is not None and scale is not None and zero is not None
    storage: torch.dtype = parse_format(str(weight.args[4]))[0].storage
    base = str(weight.args[0].target).rpartition(".")[0]  # type: ignore[union-attr]
    flat = scale.reshape(-1) if scale.ndim else scale
    values = {
        "transposed": codes.t().contiguous(),
        "column_scale": flat.float(),
        "column_zero": zero.reshape(flat.shape).to(storage),
    }
    nodes = []
    for leaf, tensor in values.items():
        with gm.graph.inserting_before(weight):
            node = gm.graph.get_attr(set_parameter(gm, f"{base}.{leaf}", tensor))
        node.meta = {"val": tensor}
        nodes.append(node)
    return nodes
