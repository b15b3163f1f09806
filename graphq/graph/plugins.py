"""Rules of other packages: rewrites and quantization patterns that are found by their entry points.

[project.entry-points."graphq.passes"]
my_rule = "my_package.rules:MyRule"

A Rewrite runs at the end of the canonical pipeline, a QuantPattern is tried before the built-in ones. In a script,
`@PASSES.register("my_rule")` does the same.
"""

from __future__ import annotations

from typing import Any

from graphq.errors import PassError
from graphq.registry import Registry

PASSES: Registry[Any] = Registry("pass", "graphq.passes")


def plugins_of(kind: type) -> tuple[type, ...]:
    """The registered rules of a kind (Rewrite or QuantPattern), by name."""
    found = {name: PASSES[name] for name in PASSES.names()}
    for name, item in found.items():
        if not isinstance(item, type) or not hasattr(item, "pattern"):
            raise PassError(
                f"the registered pass {name!r} is a {type(item).__name__}, not a Rewrite or QuantPattern class",
                where=f"entry point group {PASSES.group}",
                remedy="Register the class; put passes into a pipeline with `after` and `before`.",
            )
    return tuple(item for item in found.values() if issubclass(item, kind))
