"""One grammar for saying which layers.

"encoder.layer.0.attention"   an exact module path: that module and everything inside it
"re:.*query$"                 a regular expression over the whole module path
"encoder.*.query"             a glob over the whole module path ("*" crosses dots)
"Linear"                      a module class: its name, a base class's name, or the qualified name
torch.nn.Linear               the class itself
"aten.softmax", "linear"      an ATen op (any overload), or a family of the op table
"linear & *mlp*"              both; "linear | conv": either ("&" binds closer)
lambda layer: …               a callable on the layer (`path`, `types`, `op`, `family`, `name`)
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from typing import Any, Protocol

from graphq.errors import ConfigError

Selector = str | type | Callable[..., bool]


class Layer(Protocol):
    """What a selector may ask of a node of the graph."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def types(self) -> tuple[str, ...]: ...
    @property
    def op(self) -> str: ...
    @property
    def family(self) -> str: ...


def matches(selector: Selector, layer: Layer) -> bool:
    """Does the selector choose this layer? Raises ConfigError for a broken regular expression."""
    if isinstance(selector, type):
        return f"{selector.__module__}.{selector.__qualname__}" in layer.types
    if callable(selector):
        return bool(selector(layer))
    if not selector.startswith("re:") and (" | " in selector or " & " in selector):
        either = [part.split(" & ") for part in selector.split(" | ")]
        return any(all(matches(s.strip(), layer) for s in both) for both in either)
    if selector.startswith("re:"):
        try:
            return re.fullmatch(selector[3:], layer.path) is not None
        except re.error as e:
            raise ConfigError(f"{selector!r} is not a regular expression: {e}", remedy="Mend the pattern.") from e
    if selector.startswith("aten."):
        return layer.op == selector or layer.op.startswith(selector + ".")
    if any(c in selector for c in "*?["):
        return fnmatch.fnmatchcase(layer.path, selector)
    inside = layer.path == selector or layer.path.startswith(selector + ".")
    return inside or selector == layer.family or any(selector in (t, t.rpartition(".")[2]) for t in layer.types)


def describe(selector: Selector) -> str:
    """The selector as a reader would write it."""
    if isinstance(selector, str):
        return repr(selector)
    return getattr(selector, "__qualname__", repr(selector))


def vocabulary(layers: list[Any]) -> set[str]:
    """Every path, class name and op that a selector could name in this model, for suggestions."""
    words = {la.path for la in layers} | {la.op.rpartition(".")[0] for la in layers} | {la.family for la in layers}
    words |= {t.rpartition(".")[2] for la in layers for t in la.types}
    return {w for w in words if w}
