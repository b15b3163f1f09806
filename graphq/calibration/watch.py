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
    calls = []
    for number, (node, _) in enumerate(watchers):
        with gm.graph.inserting_after(node):
            calls.append(gm.graph.call_module(f"{FOLDER}.{number}", (node,)))
    gm.recompile()
    try:
        yield
    finally:
        for call in calls:
            gm.graph.erase_node(call)
        delattr(gm, FOLDER)
        gm.recompile()
