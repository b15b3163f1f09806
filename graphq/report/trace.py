"""What every pass changed: a snapshot of the graph before and after it, and what is different."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
from torch import Tensor, fx

from graphq.graph.view import module_stack, value_of


@dataclass(frozen=True)
class Line:
    """One node of a graph as text. inputs: the names of the nodes that it reads."""

    name: str
    op: str
    inputs: tuple[str, ...]
    arguments: str
    value: str
    path: str

    def __str__(self) -> str:
        return f"{self.name} = {self.op}({self.arguments})" + (f"   # {self.value} {self.path}".rstrip())


Snapshot = dict[str, Line]


def snapshot(gm: fx.GraphModule) -> Snapshot:
    """The graph as it is now."""
    return {n.name: _line(n) for n in gm.graph.nodes}


def _line(node: fx.Node) -> Line:
    stack = module_stack(node)
    op = str(node.target).removeprefix("aten.").removesuffix(".default")
    words = [_text(a) for a in node.args] + [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
    return Line(
        name=node.name,
        op=op if node.op in ("call_function", "call_module") else node.op,
        inputs=tuple(n.name for n in node.all_input_nodes),
        arguments=", ".join(words) if node.op.startswith("call") or node.op == "output" else str(node.target),
        value=_value(value_of(node)),
        path=stack[-1][0] if stack else "",
    )


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    return value.name if isinstance(value, fx.Node) else repr(value)


def _value(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    return ""


@dataclass
class Place:
    """One place that a pass changed: connected nodes that went and came. around: neighbours that stayed."""

    removed: list[Line]
    added: list[Line]
    around: set[str]

    @property
    def kind(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Places with the same ops gone and come are alike."""
        return tuple(sorted(_kind(r) for r in self.removed)), tuple(sorted(_kind(a) for a in self.added))

    @property
    def where(self) -> str:
        return next((x.path for x in (*self.added, *self.removed) if x.path), "(model)")

    @property
    def text(self) -> str:
        return "\n".join([*(f"- {r}" for r in self.removed), *(f"+ {a}" for a in self.added)])


def _kind(line: Line) -> str:
    return line.op if not line.op.startswith("quantizers.") else "quantizer"


@dataclass
class Step:
    """One pass: how the graph was before and after it, and the places that it changed."""

    name: str
    doc: str
    before: Snapshot
    after: Snapshot
    places: list[Place] = field(default_factory=list)

    @property
    def groups(self) -> list[list[Place]]:
        """Places that are alike, in the order of the graph."""
        found: dict[Any, list[Place]] = {}
        for place in self.places:
            found.setdefault(place.kind, []).append(place)
        return list(found.values())

    @property
    def text(self) -> str:
        head = f"{self.name}: {len(self.before)} → {len(self.after)} nodes, {len(self.places)} places changed\n"
        return head + "".join(f"\n@@ {p.where}\n{p.text}\n" for p in self.places)


def recorded(name: str, doc: str, gm: fx.GraphModule, change: Callable[[], Any]) -> tuple[Step, Any]:
    """Run one change of a graph; (what it did, what it returned). A returned graph is the graph afterwards."""
    before = snapshot(gm)
    result = change()
    after = snapshot(result if isinstance(result, fx.GraphModule) else gm)
    return Step(name, doc, before, after, _places(before, after)), result


def _places(before: Snapshot, after: Snapshot) -> list[Place]:
    stays = before.keys() & after.keys()
    same = {n for n in stays if _same(before[n], after[n], stays)}
    gone = {n: line for n, line in before.items() if n not in same}
    come = {n: line for n, line in after.items() if n not in same}
    touched = nx.Graph()
    for side in (gone, come):
        touched.add_nodes_from(side)
        touched.add_edges_from((n, i) for n, line in side.items() for i in line.inputs if i in gone or i in come)
    order = {n: k for k, n in enumerate([*before, *(n for n in after if n not in before)])}
    places = []
    for names in nx.connected_components(touched):
        ordered = sorted(names, key=order.__getitem__)
        removed, added = ([side[n] for n in ordered if n in side] for side in (gone, come))
        places.append(Place(removed, added, _around(names, before) | _around(names, after)))
    return sorted(places, key=lambda p: min(order[x.name] for x in (*p.removed, *p.added)))


def _same(a: Line, b: Line, stays: set[str]) -> bool:
    """The same op with the same attributes on the same operands; others may stand between it and what it reads."""
    plain = [[w for w in line.arguments.split(", ") if w.strip("[]") not in line.inputs] for line in (a, b)]
    operands = [[i for i in line.inputs if i in stays] for line in (a, b)]
    swapped = sorted(operands[0]) == sorted(operands[1]) and operands[0] != operands[1]
    return a.op == b.op and len(a.inputs) == len(b.inputs) and plain[0] == plain[1] and not swapped


def _around(names: set[str], graph: Snapshot) -> set[str]:
    inputs = {i for n in names if n in graph for i in graph[n].inputs}
    readers = {n for n, line in graph.items() if names.intersection(line.inputs)}
    return (inputs | readers) - names
