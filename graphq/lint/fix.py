"""Repair what has one right answer, and prove that the model computes the same.

The proof: with its optimizer off ONNX Runtime computes what the file says, QDQ by QDQ; both models do so on random
inputs and must give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import numpy_helper

from graphq.errors import RuntimeMismatch
from graphq.evaluate.latency import random_feed_of
from graphq.evaluate.taps import session
from graphq.lint.graph import Dequantized, Graph
from graphq.lint.onnxruntime import second_quantizations, several_quantized
from graphq.lint.rules import Finding, lint


def fix(
    model: onnx.ModelProto, target: str = "onnxruntime", *, saturates: bool = False
) -> tuple[onnx.ModelProto, list[Finding]]:
    """(a repaired copy, what was found in the model that could not be repaired). The model stays as it is.

    Raises RuntimeMismatch, and gives nothing, where the repaired model does not compute the same bits.
    """
    _expect_plain(model)
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    done: set[tuple[str, str]] = set()
    while True:  # one repair may bring the next to light
        found = [f for f in lint(fixed, target) if f.fixable and (f.rule, f.node) not in done]
        if not found:
            break
        name = found[0].rule
        done |= {(f.rule, f.node) for f in found if f.rule == name}
        FIXES[name](Graph(fixed), {f.node for f in found if f.rule == name})
        _drop_unused(fixed)
    try:
        onnx.checker.check_model(fixed)
        _prove(model, fixed)
    except RuntimeMismatch:
        raise
    except Exception as e:  # onnx and ONNX Runtime each raise their own kinds
        raise RuntimeMismatch(
            f"the repair could not be proved on random inputs: {str(e).splitlines()[0][:160]}",
            remedy="Repair the findings by hand, or quantize the model again.",
        ) from e
    return fixed, lint(fixed, target, saturates=saturates)


def _expect_plain(model: onnx.ModelProto) -> None:
    """Values that subgraphs read, and constants that callers may override, are not followed here."""
    inside = any(a.HasField("g") or a.graphs for n in model.graph.node for a in n.attribute)
    overridable = {i.name for i in model.graph.input} & {i.name for i in model.graph.initializer}
    if inside or overridable:
        what = "branches or loops" if inside else "initializers that are inputs too"
        raise RuntimeMismatch(
            f"a model with {what} is not repaired", remedy="Lint it without --fix, and repair it where it is made."
        )


def _prove(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    sessions = [session(m.SerializeToString(), optimize=False) for m in (before, after)]
    for seed in range(3):
        feed = random_feed_of(sessions[0], seed=seed)
        for a, b in zip(*(s.run(None, feed) for s in sessions), strict=True):
            if not np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
                raise RuntimeMismatch(
                    "the repaired model does not compute what the model did", remedy="Please report it with the model."
                )


def _float_weights(g: Graph, nodes: set[str]) -> None:
    _make_float(g, nodes, 1)


def _float_biases(g: Graph, nodes: set[str]) -> None:
    _make_float(g, nodes, 2)


def _make_float(g: Graph, nodes: set[str], position: int) -> None:
    """A float constant in the place of a dequantized one."""
    for node in g.nodes:
        given = g.dequantized(node.input[position]) if g.label(node) in nodes and len(node.input) > position else None
        if given is None:
            continue
        tensor = numpy_helper.from_array(values_of(g, given), _fresh(g, f"{node.input[position]}_float"))
        g.model.graph.initializer.append(tensor)
        node.input[position] = tensor.name


def values_of(g: Graph, given: Dequantized) -> np.ndarray:
    """What a DequantizeLinear makes of constant codes, in the type of its scale."""
    codes = g.array(given.codes)
    assert codes is not None and given.scale is not None
    scale = given.scale
    zero = np.zeros_like(scale, dtype=codes.dtype) if given.zero is None else given.zero
    if given.per_axis:
        shape = [-1 if d == given.axis % codes.ndim else 1 for d in range(codes.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    whole = np.int32 if np.issubdtype(codes.dtype, np.integer) else np.float32  # small floats have no zero point
    values: np.ndarray = (codes.astype(whole) - zero.astype(whole)).astype(scale.dtype) * scale
    return values


def _fresh(g: Graph, name: str) -> str:
    """A name that no value has yet; from now on it is taken."""
    taken = {
        *g.initializers,
        *g.made,
        *(i.name for i in g.model.graph.input),
        *(i.name for i in g.model.graph.initializer),
    }
    unique, number = name, 0
    while unique in taken:
        number += 1
        unique = f"{name}_{number}"
    return unique


def _one_quantization(g: Graph, nodes: set[str]) -> None:
    for node, source in second_quantizations(g):
        if g.label(node) in nodes:
            _redirect(g, node.output[0], source.input[0])


def _one_quantizer(g: Graph, nodes: set[str]) -> None:
    for name, equal in several_quantized(g):
        if equal and g.label(g.made[name]) in nodes:
            first, *others = g.readers[name]
            for other in others:
                _redirect(g, other.output[0], first.output[0])


def _redirect(g: Graph, old: str, new: str) -> None:
    for reader in g.readers.get(old, []):
        for position, name in enumerate(reader.input):
            if name == old:
                reader.input[position] = new


def _zero_points(g: Graph, nodes: set[str]) -> None:
    for node in g.nodes:
        if g.label(node) not in nodes or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, kind = g.array(node.input[1]), g.code_type(node)
        if scale is None or kind is None:
            continue
        name = _fresh(g, f"{node.output[0]}_zero_point")
        g.model.graph.initializer.append(numpy_helper.from_array(np.zeros(scale.shape, kind), name))
        del node.input[2:]
        node.input.append(name)


def _drop_unused(model: onnx.ModelProto) -> None:
    """Nodes and initializers that nothing reads."""
    while True:
        used = {n for node in model.graph.node for n in node.input} | {o.name for o in model.graph.output}
        dead = [n for n in model.graph.node if used.isdisjoint(n.output)]
        for node in dead:
            model.graph.node.remove(node)
        if not dead:
            break
    unused = [i for i in model.graph.initializer if i.name not in used]
    for initializer in unused:
        model.graph.initializer.remove(initializer)


FIXES: dict[str, Callable[[Graph, set[str]], None]] = {
    "weight_axis": _float_weights,
    "bias_scale": _float_biases,
    "quantized_bias": _float_biases,
    "double_qdq": _one_quantization,
    "several_quantizations": _one_quantizer,
    "zero_point": _zero_points,
}
