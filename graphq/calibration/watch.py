"""Show tensors of a graph to modules that gather statistics, for the time of one calibration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import fx, nn

FOLDER = "_watchers"


@contextmanager
def watching(gm: fx.GraphModule, watchers: Iterable[tuple[fx.Node, nn.Module]]) -> Iterator[None]:
    """Within the block every run of the graph calls each watcher with the tensor of its node; after it the graph is
    as it was."""
    watchers = list(watchers)
    folder = nn.ModuleList(watcher for _, watcher in watchers)
    gm.add_submodule(FOLDER, folder)
    calls: list[fx.Node] = []
    behind = (gm.graph.find_nodes(op="placeholder") or [None])[-1]
    for number, (node, _) in enumerate(watchers):
        is_input = node.op == "placeholder"
        with gm.graph.inserting_after(behind if is_input else node):
            calls.append(gm.graph.call_module(f"{FOLDER}.{number}", (node,)))
        behind = calls[-1] if is_input else behind  # inputs in the order of their watchers: a mask before what it masks
    gm.recompile()
    try:
        yield
    finally:
        for call in calls:
            gm.graph.erase_node(call)
        delattr(gm, FOLDER)
        gm.recompile()
