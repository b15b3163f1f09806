"""What an algorithm is: a function of prepared graphs that changes them before their ranges are observed.

    @ALGORITHMS.register("smoothquant")
    def smoothquant(graphs, run, *, alpha="search"): ...

graphs: made of one model for several targets, all computing the float model; one as a rule. run: shows the calibration
data to modules, given as (node of the first graph, module) pairs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from graphq.errors import ConfigError, did_you_mean
from graphq.registry import Registry

Run = Callable[[Sequence[tuple[fx.Node, nn.Module]]], None]
ALGORITHMS: Registry[Callable[..., None]] = Registry("algorithm", "graphq.algorithms")


def check_arguments(name: str, args: dict[str, Any]) -> None:
    """Raises ConfigError for a name or arguments that no algorithm has."""
    known = [p.name for p in inspect.signature(ALGORITHMS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for given in args:
        if given not in known:
            raise ConfigError(
                f"the algorithm {name!r} has no argument {given!r}", remedy=did_you_mean(given, known or ["none"])
            )
