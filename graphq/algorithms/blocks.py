"""Blocks of a graph: parts that are entered and left by few tensors, found without names.

Behind an op those values are alive that later ops read. Where all that layers have computed so far is alive in a single
tensor (a residual stream, what one convolution passes to the next), the graph is cut; parts between two cuts are joined
while they have few layers together. Of a decoder these are its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from graphq.algorithms.base import Stream
from graphq.algorithms.layers import Layer
from graphq.graph.view import value_of


@dataclass(frozen=True)
class Block:
    """The ops behind `start`, up to `stop`. layers: those whose ops are among them, in their order. results: what later
    ops and the output read of what they compute."""

    start: fx.Node
    stop: fx.Node
    layers: tuple[Layer, ...]
    results: tuple[fx.Node, ...]


def cut_into_blocks(stream: Stream, sources: dict[fx.Node, list[Layer]], most: int) -> list[Block]:
    """sources: layers by the tensor that they read. most: layers of a block that is made of several parts."""
    order = stream.order
    place = {n: i for i, n in enumerate(order)}
    layers = {layer.node: layer for every in sources.values() for layer in every}
    alive = _alive_behind(order, {*layers, *sources})
    start, last = min(place[s] for s in sources), max(place[n] for n in layers)
    cuts = [i for i in range(start + 1, len(order)) if len(alive[i]) == 1 and _is_one_float(alive[i][0])]
    given = {n for n in order[-1].all_input_nodes if _is_one_float(n)}
    if not cuts or cuts[-1] < last:  # what the last layers end in is not read again, but given back
        cuts.append(max([last, *(place[n] for n in given if n in place)]))
    blocks: list[Block] = []
    before, pending = start, list[Layer]()

    def end(at: int) -> None:
        back = [n for n in order[start + 1 : at + 1] if n in given]
        results = dict.fromkeys([*(n for n in alive[at] if _is_one_float(n)), *back])
        blocks.append(Block(order[start], order[at], tuple(pending), tuple(results)))

    for cut in cuts:
        here = [layers[n] for n in order[before + 1 : cut + 1] if n in layers]
        if pending and here and len(pending) + len(here) > most:
            end(before)
            start, pending = before, []
        pending += here
        before = cut
        if cut >= last:
            break
    end(before)
    return blocks


def _is_one_float(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.is_floating_point()


def _alive_behind(order: list[fx.Node], first: set[fx.Node]) -> list[list[fx.Node]]:
    """For every op, what later ops read of these nodes and of what is computed from them: no masks and positions, which
    all blocks read, and no sizes and integers. What only the output reads is alive no longer."""
    place = {n: i for i, n in enumerate(order)}
    found, computed, alive = [], set[fx.Node](), list[fx.Node]()
    for i, node in enumerate(order):
        if node in first or any(n in computed for n in node.all_input_nodes):
            value = value_of(node)
            if _is_one_float(node) or isinstance(value, (tuple, list)):
                computed.add(node)
                alive = [*alive, node]
        alive = [n for n in alive if any(place.get(u, -1) > i and u.op != "output" for u in n.users)]
        found.append(alive)
    return found
