"""Rules of other packages: rewrites and quantization patterns that are found by their entry points.

[project.entry-points."graphq.passes"]
my_rule = "my_package.rules:MyRule"

A Rewrite runs at the end of the canonical pipeline, a QuantPattern is tried before the built-in ones. In a script,
`@PASSES.register("my_rule")` does the same.
"""

from __future__ import annotations

from typing import Any

from graphq.registry import Registry

PASSES: Registry[Any] = Registry("pass", "graphq.passes")


def plugins_of(kind: type) -> tuple[type, ...]:
    """The registered rules of a kind (Rewrite or QuantPattern), by name."""
    found = (PASSES[name] for name in PASSES.names())
    return tuple(item for item in found if isinstance(item, type) and issubclass(item, kind))
