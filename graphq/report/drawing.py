"""A few nodes of a graph as a drawing (SVG): networkx lays them out in layers, the flow runs downwards."""

from __future__ import annotations

import html

import networkx as nx

from graphq.report.trace import Line, Place, Snapshot

WIDTH, HEIGHT, GAP_X, GAP_Y = 168, 34, 16, 30


def draw(place: Place, graph: Snapshot, *, gone: bool) -> str:
    """The neighbourhood of a place in a snapshot, as SVG; what goes is red, what comes is green."""
    marked = {line.name for line in (place.removed if gone else place.added)}
    names = [n for n in graph if n in marked or n in place.around]
    dag = nx.DiGraph()
    dag.add_nodes_from(names)
    dag.add_edges_from((i, n) for n in names for i in graph[n].inputs if i in names)
    if not names:
        return ""
    for depth, layer in enumerate(nx.topological_generations(dag)):
        for n in layer:
            dag.nodes[n]["layer"] = depth
    for n in reversed(list(nx.topological_sort(dag))):  # inputs stand right above what reads them
        below = [dag.nodes[s]["layer"] for s in dag.successors(n)]
        if below:
            dag.nodes[n]["layer"] = min(below) - 1
    lowest = min(d for _, d in dag.nodes(data="layer"))
    layout = nx.multipartite_layout(dag, subset_key="layer", align="horizontal")
    at = _pixels(dag, {n: p[0] for n, p in layout.items()}, lowest)
    width = max(x for x, _ in at.values()) + WIDTH + 4
    height = max(y for _, y in at.values()) + HEIGHT + 4
    colour = "gone" if gone else "come"
    parts = [_edge(at[a], at[b]) for a, b in dag.edges]
    parts += [_box(_label(graph[n]), graph[n].value, n, at[n], colour if n in marked else "stays") for n in names]
    return f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}">{"".join(parts)}</svg>'


def _pixels(dag: nx.DiGraph, across: dict[str, float], lowest: int) -> dict[str, tuple[int, int]]:
    """Boxes of one layer stand side by side in the order of the layout."""
    layers: dict[int, list[str]] = {}
    for n, layer in dag.nodes(data="layer"):
        layers.setdefault(layer - lowest, []).append(n)
    widest = max(len(names) for names in layers.values())
    at = {}
    for layer, names in layers.items():
        left = (widest - len(names)) * (WIDTH + GAP_X) // 2
        for column, n in enumerate(sorted(names, key=across.__getitem__)):
            at[n] = (left + column * (WIDTH + GAP_X) + 2, layer * (HEIGHT + GAP_Y) + 2)
    return at


def _edge(a: tuple[int, int], b: tuple[int, int]) -> str:
    (x0, y0), (x1, y1) = (a[0] + WIDTH // 2, a[1] + HEIGHT), (b[0] + WIDTH // 2, b[1])
    middle = (y0 + y1) // 2
    return f'<path class="edge" d="M{x0} {y0}C{x0} {middle},{x1} {middle},{x1} {y1}"/>'


def _label(line: Line) -> str:
    return line.arguments if line.op == "get_attr" else line.op


def _box(op: str, value: str, name: str, at: tuple[int, int], kind: str) -> str:
    x, y = at
    title = op if len(op) < 24 else f"…{op[-22:]}"
    return (
        f'<g class="{kind}"><title>{html.escape(f"{name}: {op} {value}")}</title>'
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>'
        f'<text x="{x + WIDTH // 2}" y="{y + 14}">{html.escape(title)}</text>'
        f'<text class="small" x="{x + WIDTH // 2}" y="{y + 27}">{html.escape(value[:28])}</text></g>'
    )
