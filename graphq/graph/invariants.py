"""What must hold between passes.

`check_graph` is cheap and always on. The others, and the promises of the passes, are checked inside `checking()`: in
the tests, and on the command line with --check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphq.errors import PassError
from graphq.graph.decision import decision_of
from graphq.graph.infer import infer
from graphq.graph.ops import AGAIN, DEQUANTIZE, QUANTIZE
from graphq.graph.optable import family_of
from graphq.graph.view import parameter

Invariant = Callable[[fx.GraphModule], str | None]  # why it does not hold, or None

_CHECKING: ContextVar[bool] = ContextVar("graphq_checking", default=False)


@contextmanager
def checking(on: bool = True) -> Iterator[None]:
    """Check every invariant and every promise after every pass inside this block."""
    token = _CHECKING.set(on)
    try:
        yield
    finally:
        _CHECKING.reset(token)


def is_checking() -> bool:
    """Are we inside `checking()`?"""
    return _CHECKING.get()


def check_graph(gm: fx.GraphModule) -> None:
    """Raises PassError if the graph is malformed: order, dangling references, missing tensors or modules."""
    try:
        gm.graph.lint()
    except (RuntimeError, AssertionError, AttributeError) as e:
        raise PassError(f"the graph is malformed: {e}", remedy="A pass left it so: run them one by one.") from e
    for node in gm.graph.nodes:
        if node.op == "get_attr" and parameter(gm, node) is None:
            raise PassError("a get_attr node reads no tensor", where=str(node.target))
    _raise_first(gm, no_dangling_quantizer)


def check_stage(gm: fx.GraphModule, *more: Invariant, after: str) -> None:
    """Inside `checking()`: everything that must hold, and `more`, after a stage that is no pass of a pipeline."""
    if is_checking():
        check_all(gm, *more, after=after)


def check_all(gm: fx.GraphModule, *more: Invariant, after: str = "") -> None:
    """Check everything that must hold at any time, and `more`. Raises PassError that names the pass and the place."""
    check_graph(gm)
    _raise_first(gm, no_symbols, typed, one_quantizer_per_edge, scales_shared, *more, after=after)


def _raise_first(gm: fx.GraphModule, *invariants: Invariant, after: str = "") -> None:
    for invariant in invariants:
        reason = invariant(gm)
        if reason is not None:
            raise PassError(
                f"{reason}{f' after the pass {after}' if after else ''}",
                where=f"invariant {getattr(invariant, '__name__', invariant)}",
                remedy="Mend that pass: `graphq trace --passes` shows what it changed.",
            )


def typed(gm: fx.GraphModule) -> str | None:
    """Every ATen op's example value is what the op really gives on its inputs."""
    for node in gm.graph.nodes:
        if node.op != "call_function" or not str(node.target).startswith("aten."):
            continue
        said, real = (pytree.tree_leaves(v) for v in (node.meta.get("val"), infer(node)))
        if len(said) != len(real):
            return f"{node.name} is said to have {len(said)} results and has {len(real)}"
        for a, b in zip(said, real, strict=True):
            if isinstance(b, Tensor) and not _same_type(a, b):
                return f"{node.name} is said to be {_type(a)} and is {_type(b)}"
    return None


def _same_type(said: object, real: Tensor) -> bool:
    if not isinstance(said, Tensor) or said.dtype != real.dtype or said.ndim != real.ndim:
        return False
    return all(_fixed(a) == _fixed(b) for a, b in zip(said.shape, real.shape, strict=True))


def _fixed(size: int | torch.SymInt) -> int | None:
    """A size that is known; None for one that depends on the inputs."""
    if isinstance(size, torch.SymInt):
        return None if size.node.expr.free_symbols else int(size)
    return size


def _type(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def no_symbols(gm: fx.GraphModule) -> str | None:
    """Symbolic sizes are computed by nodes, never written into the arguments of an op."""
    for node in gm.graph.nodes:
        if any(isinstance(a, torch.SymInt) for a in pytree.tree_leaves((node.args, node.kwargs))):
            return f"{node.name} has a symbolic size among its arguments: {node.args}"
    return None


def no_dangling_quantizer(gm: fx.GraphModule) -> str | None:
    """Every quantizer is read by something."""
    return next((f"the quantizer {n.target} feeds nothing" for n in _quantizers(gm) if not n.users), None)


def one_quantizer_per_edge(gm: fx.GraphModule) -> str | None:
    """A tensor is quantized once, however many ops read it, and twice in a row only where a spec says so (`then`)."""
    seen: dict[fx.Node, fx.Node] = {}
    for node in _quantizers(gm):
        source = node.args[0]
        if not isinstance(source, fx.Node):
            continue
        if source in seen:
            return f"{source.name} is quantized by {seen[source].name} and again by {node.name}"
        if (source.op == "call_module" or source.target is DEQUANTIZE) and AGAIN not in node.meta:
            return f"{node.name} quantizes what {source.name} has quantized"
        seen[source] = node
    return None


def scales_shared(gm: fx.GraphModule) -> str | None:
    """An op that only moves data leaves it with the scale with which it came."""
    for node in gm.graph.nodes:
        decision = decision_of(node)
        if decision is None or decision.action != "carry" or not node.users:
            continue
        before = [_scale_of(a) for a in node.all_input_nodes if _scale_of(a) is not None]
        after = {_scale_of(u) for u in node.users} - {None}
        if before and after and after != set(before[:1]):
            return f"{node.name} moves codes of scale {before[0]} and its result has {', '.join(map(str, after))}"
    return None


def _quantizers(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "call_module" or n.target is QUANTIZE]


def _scale_of(node: fx.Node) -> str | None:
    """The name of a quantizer's scale: its module, or the parameter that a Q or DQ reads."""
    if node.op == "call_module":
        return str(node.target)
    if node.target in (QUANTIZE, DEQUANTIZE) and isinstance(node.args[1], fx.Node):
        return str(node.args[1].target)
    return None


def none_of(*families: str) -> Invariant:
    """No op of these families is left."""

    def holds(gm: fx.GraphModule) -> str | None:
        found = next((n for n in gm.graph.nodes if n.op == "call_function" and family_of(n.target) in families), None)
        return None if found is None else f"{found.name} ({found.target}) is left"

    holds.__name__ = f"none_of({', '.join(families)})"
    return holds


def decided(gm: fx.GraphModule) -> str | None:
    """Every op has a decision and a reason."""
    for node in gm.graph.nodes:
        decision = decision_of(node)
        if node.op == "call_function" and (decision is None or not decision.reason):
            return f"nothing was decided on {node.name}"
    return None
