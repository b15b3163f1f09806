"""The graphs of several targets, where one graph is wanted."""

from __future__ import annotations

from typing import Any

from graphq.errors import StateError


def expect_one(graph: Any, caller: str) -> None:
    """Raises StateError for a dict of graphs."""
    if isinstance(graph, dict):
        first = next(iter(graph), "onnxruntime")
        raise StateError(
            f"{caller} takes one graph, and got those of {', '.join(map(str, graph))}",
            remedy=f"Give one of them: graphs[{first!r}].",
        )
