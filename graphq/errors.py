"""Errors as part of the product: what went wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraphqError(Exception):
    """Base of all errors that graphq raises on purpose.

    what: one sentence. where: a module path, op, file or config key. remedy: what the reader does next.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = what, where, remedy
        lines = [what]
        if where:
            lines.append(f"  where:  {where}")
        if remedy:
            lines.append(f"  remedy: {remedy}")
        super().__init__("\n".join(lines))


class ConfigError(GraphqError):
    """The config asks for something that does not exist or cannot be."""


class CaptureError(GraphqError):
    """The model could not be traced into a graph."""


class PassError(GraphqError):
    """A graph pass met or left a graph that breaks an invariant."""


class CalibrationError(GraphqError):
    """Calibration data is missing, of the wrong shape, or not finite."""


class StateError(GraphqError):
    """A stage was called out of order (prepare → calibrate → convert → export)."""


class TargetError(GraphqError):
    """A target is unknown, or cannot express what the config asks for."""


class ExportError(GraphqError):
    """The file could not be written, or would not be valid."""


class LoadError(GraphqError):
    """A saved graph is damaged, or does not belong to the model."""


class RuntimeMismatch(GraphqError):
    """A file and the graph that it is compared with do not belong together."""


NOT_FINITE = "Look for inputs or weights that are infinite or NaN."  # a remedy


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"Did you mean 'int8'? Known: …"` for an unknown name, nearest first."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    shown = ", ".join(known[:12]) + (f", … ({len(known)} in all)" if len(known) > 12 else "")
    hint = f"Did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    return f"{hint}Known: {shown}."
