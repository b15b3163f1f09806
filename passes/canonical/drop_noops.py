"""Drop what computes nothing in inference: dropout, casts and views that change nothing, copies, asserts."""

import torch
from torch import Tensor, fx

from graphq.graph.match import Match
from graphq.graph.passes import Rewrite
from graphq.graph.view import value_of

FIRST, LAST = 0, 2**63 - 1


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Are two example values of one shape, dimension by dimension, whatever the dynamic sizes?"""
    return len(a.shape) == len(b.shape) and all(
        x is y or str(x) == str(y) for x, y in zip(a.shape, b.shape, strict=True)
    )


class ViewToReshape(Rewrite):
    """view(x, shape)  ⇒  reshape(x, shape): a view that needs no copies before it, so that those can go."""

    equivalence = "exact"

    @staticmethod
    def pattern(op, x):
        return op.reshape(x)

    @staticmethod
    def check(m: Match) -> str | None:
        return None if m.root.op in ("aten.view.default", "aten._unsafe_view.default") else "not a view"

    @staticmethod
    def rewrite(m: Match):
        return m.call(torch.ops.aten.reshape.default, m.x, m.root.arg("size"))


class DropDropout(Rewrite):
    """x ── dropout ── y  ⇒  x ── y, in eval mode."""

    equivalence = "exact"

    @staticmethod
    def pattern(op, x, p, train):
        return op.dropout(x, p, train)

    @staticmethod
    def check(m: Match) -> str | None:
        return "the dropout is in training mode" if m.train else None

    @staticmethod
    def rewrite(m: Match):
        return m.x


class DropIdentity(Rewrite):
    """x ── clone | contiguous | alias | detach ── y  ⇒  x ── y."""

    equivalence = "exact"

    @staticmethod
    def pattern(op, x):
        return op.identity(x)

    @staticmethod
    def rewrite(m: Match):
        return m.x


class DropCast(Rewrite):
    """x ── to(dtype, device) ── y  ⇒  x ── y, when x has that dtype and device already."""

    equivalence = "exact"

    @staticmethod
    def pattern(op, x):
        return op.cast(x)

    @staticmethod
    def check(m: Match) -> str | None:
        before, after = value_of(m.x.node), value_of(m.root.node)
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            return "the example values are unknown"
        if before.dtype != after.dtype or before.device != after.device:
            return f"it casts {before.dtype} to {after.dtype}"
        return None

    @staticmethod
    def rewrite(m: Match):
        return m.x


class DropReshape(Rewrite):
    """x ── view ── y  ⇒  x ── y, when the shape stays the same."""

    equivalence = "exact"

    @staticmethod
    def pattern(op, x):
        return op.reshape(x)

    @staticmethod
    def check(m: Match) -> str | None:
        return _changes_shape(m)

    @staticmethod
    def rewrite(m: Match):
        return m.x


class DropExpand(Rewrite):
    """x ── expand ── y  ⇒  x ── y, when the shape stays the same."""

    equivalence = "exact"

    @staticmethod
    def pattern(op, x):
        return op.expand(x)

    @staticmethod
    def check(m: Match) -> str | None:
        return _changes_shape(m)

    @staticmethod
    def rewrite(m: Match):
        return m.x


class DropSlice(Rewrite):
    """x ── slice(dim, 0, end of the dimension) ── y  ⇒  x ── y."""

    equivalence = "exact"

    @staticmethod
    def pattern(op, x):
        return op.slice(x)

    @staticmethod
    def check(m: Match) -> str | None:
        if m.root.op != "aten.slice.Tensor":
            return "it selects"
        if m.root.arg("start") not in (None, FIRST) or m.root.arg("end") not in (None, LAST) or m.root.arg("step") != 1:
            return "it takes a part"
        return None

    @staticmethod
    def rewrite(m: Match):
        return m.x


def _changes_shape(m: Match) -> str | None:
    before, after = value_of(m.x.node), value_of(m.root.node)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return "the example values are unknown"
    return None if same_shape(before, after) else "it changes the shape"


def drop_asserts(gm: fx.GraphModule) -> int:
    """Erase the runtime assertions that tracing leaves; they have no users and no result."""
    changed = 0
    for node in reversed(gm.graph.nodes):
        name = getattr(getattr(node.target, "_schema", None), "name", "")
        is_assert = "assert" in name or "sym_constrain_range" in name or node.target is torch.sym_not
        if node.op == "call_function" and is_assert and not node.users:
            gm.graph.erase_node(node)
            changed += 1
    return changed
