"""Configs of other systems as rules. Each keeps its source's precedence, and its rules say so where `explain` prints
them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphq.errors import ConfigError


def take(fields: Mapping[str, Any], source: str, known: tuple[str, ...]) -> dict[str, Any]:
    """The fields that are set. Raises ConfigError for a key that is not known there: nothing is dropped silently."""
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ConfigError(
            f"{source} with {', '.join(map(repr, unknown))} is not understood",
            remedy=f"Understood are: {', '.join(known)}.",
        )
    return {k: v for k, v in fields.items() if v is not None}


def plain(value: Any) -> Any:
    """A mapping from a dataclass, pydantic model or mapping of another library."""
    if isinstance(value, Mapping):
        return value
    for method in ("model_dump", "to_dict"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise ConfigError(f"a config is a mapping, not a {type(value).__name__}", remedy="Pass its dict form.")
