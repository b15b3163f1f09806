"""Lower linears and embeddings with integer weights and float inputs to kernels that read packed codes.

    linear(x, dequantize(codes [out, in]))        ⇒   matmul_nbits(x, packed codes, …)
    embedding(dequantize(codes [rows, in]), ids)  ⇒   gather_nbits(packed codes, ids)

Which ops these are is decided by `annotate`, from the target's table of weight-only kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphq.config.spec import QuantSpec
from graphq.graph.decision import decision_of
from graphq.graph.integer_ops import REPLACES
from graphq.graph.nbits_ops import GATHER_NBITS, MATMUL_NBITS
from graphq.graph.ops import DEQUANTIZE, parse_format
from graphq.graph.view import LayerView, parameter, set_parameter
from graphq.numerics.formats import Format, Integer
from graphq.numerics.packing import pack

BLOCKS = (256, 128, 64, 32, 16)  # the block sizes of these kernels
USUAL_BLOCK = 32
INT8_ROUNDING_FROM = 32  # smallest block in which codes of two bits meet rounded inputs (ONNX Runtime 1.32)


def packed_bits(fmt: Format) -> int | None:
    """Bits of a code in the packed form; None where it has none."""
    return next((n for n in (2, 4, 8) if n >= fmt.bits), None) if isinstance(fmt, Integer) else None


def block_size(spec: QuantSpec, row: int) -> int:
    """Values that share a scale in the packed form: the spec's group, or a part of a row whose parts have one scale."""
    if spec.granularity == "group":
        assert spec.group_size is not None
        return spec.group_size
    return next((b for b in BLOCKS[1:] if row % b == 0), USUAL_BLOCK)


def lower_weight_only(gm: fx.GraphModule, accuracy_level: int) -> None:
    """Rewrite, in place, every op that was decided to run on packed codes."""
    packed: dict[tuple[fx.Node, int], tuple[Any, ...]] = {}
    for node in list(gm.graph.nodes):
        decision = decision_of(node)
        if decision is None or decision.action != "weight_only" or decision.weight_spec is None:
            continue
        if decision.kernel == "MatMulNBits":
            _matmul(gm, node, decision.weight_spec, accuracy_level, packed)
        elif decision.kernel == "GatherBlockQuantized":
            _gather(gm, node, decision.weight_spec, packed)
    gm.graph.eliminate_dead_code()


def _matmul(gm: fx.GraphModule, node: fx.Node, spec: QuantSpec, level: int, packed: dict[Any, Any]) -> None:
    view = LayerView(gm, node)
    x, weight, bias = (view.arg(k) for k in ("input", "weight", "bias"))
    codes, scale, zero, k, bits, size = _packed(gm, weight, spec, packed)
    if bits == 2 and size < INT8_ROUNDING_FROM:
        level = 0
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(MATMUL_NBITS, (x, codes, scale, zero, bias, k, bits, size, level))
    _replace(gm, node, new)


def _gather(gm: fx.GraphModule, node: fx.Node, spec: QuantSpec, packed: dict[Any, Any]) -> None:
    view = LayerView(gm, node)
    codes, scale, zero, k, bits, size = _packed(gm, view.arg("weight"), spec, packed)
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(GATHER_NBITS, (codes, view.arg("indices"), scale, zero, k, bits, size))
    _replace(gm, node, new)


def _replace(gm: fx.GraphModule, old: fx.Node, new: fx.Node) -> None:
    new.meta = {**old.meta, REPLACES: old.name}
    old.replace_all_uses_with(new)
    gm.graph.erase_node(old)


def _packed(gm: fx.GraphModule, weight: Any, spec: QuantSpec, made: dict[Any, Any]) -> tuple[Any, ...]:
    """(codes, scale, zero point or None: nodes that read them; length of a row, bits, block size) of a weight. A weight
    with two readers (a tied embedding) is packed once."""
    assert isinstance(weight, fx.Node) and weight.target is DEQUANTIZE, weight
    reads = weight.args[:3]
    codes, scale, zero = (parameter(gm, r) for r in reads)  # type: ignore[arg-type]
    assert codes is not None and scale is not None and zero is not None
    fmt, _ = parse_format(str(weight.args[4]))
    size = block_size(spec, codes.shape[1])
    key = (reads[0], size)
    if key not in made:
        made[key] = _read_packed(gm, weight, *pack_weight(codes, scale, zero, fmt, size))
    return (*made[key], codes.shape[1], packed_bits(fmt), size)


def pack_weight(
    codes: Tensor, scale: Tensor, zero: Tensor, fmt: Format, size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """codes [rows, k] with a scale per tensor, row or group → what `graphq.graph.nbits_ops` reads."""
    bits = packed_bits(fmt)
    assert bits is not None
    rows, k = codes.shape
    blocks = -(-k // size)
    middle = 1 << (bits - 1) if fmt.signed else 0  # signed codes move up by half the range
    wide = torch.nn.functional.pad(codes.to(torch.int32) + middle, [0, blocks * size - k])
    scales = scale.reshape(scale.shape if scale.ndim == 2 else (1, 1)).float()
    zeros = zero.reshape(scales.shape).to(torch.int32) + middle
    scales, zeros = (t.expand(rows, blocks).contiguous() for t in (scales, zeros))
    usual = bool((zeros == 1 << (bits - 1)).all())
    return pack(wide.view(rows, blocks, size), bits), scales, None if usual else pack(zeros, bits)


def _read_packed(
    gm: fx.GraphModule, weight: fx.Node, codes: Tensor, scale: Tensor, zero: Tensor | None
) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    base = str(weight.args[0].target).rpartition(".")[0]  # type: ignore[union-attr]
    nodes: list[fx.Node | None] = []
    for leaf, tensor in (("packed", codes), ("block_scale", scale), ("packed_zero", zero)):
        if tensor is None:
            nodes.append(None)
            continue
        with gm.graph.inserting_before(weight):
            node = gm.graph.get_attr(set_parameter(gm, f"{base}.{leaf}", tensor))
        node.meta = {"val": tensor}
        nodes.append(node)
    return tuple(nodes)  # type: ignore[return-value]
