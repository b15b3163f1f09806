"""Several weight algorithms side by side, on one run of the float model over the data."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import fx

from graphq.algorithms.base import check_arguments
from graphq.algorithms.layers import by_input
from graphq.algorithms.moments import moments_of
from graphq.algorithms.results import WeightResult
from graphq.algorithms.sequential import ASYMMETRIC, FUNCTIONS, OF_THE_WALK, alike_in_rows, round_weights
from graphq.calibration.runner import progress_of
from graphq.calibration.stream import Stream
from graphq.config.config import Algorithm
from graphq.errors import ConfigError, did_you_mean
from graphq.passes.placement import shared_magnitudes


def compare_algorithms(
    prepared: fx.GraphModule, data: Any, algorithms: Sequence[str | dict[str, Any]], *, progress: bool = True
) -> list[WeightResult]:
    """What each algorithm would lose on each layer; the graph stays as it is.

    algorithms: names, or {"name": "gptq", "args": {"damping": 0.1}}. All see the inputs of the float model: what
    rounded layers pass on to the next, and `qep` makes good, shows in a whole run only. Raises ConfigError for what
    is no function of one weight.
    """
    asked = [Algorithm(name=a) if isinstance(a, str) else Algorithm(**a) for a in algorithms]
    chosen = {_label(a): _function(a) for a in asked}
    groups, _ = by_input(prepared)
    if not groups:
        raise ConfigError("there is no weight to choose", remedy="Let a rule quantize some.")
    stream, shared, results = Stream(prepared, data), shared_magnitudes(prepared), []
    for source, layers in progress_of(groups.items(), "algorithms", show=progress):
        inputs = stream.until(source)
        for alike in alike_in_rows(layers):
            moments = moments_of(alike[0], inputs, None, stream)
            for layer in alike:
                overall = shared.get(layer.quantizer)
                for name, choose in chosen.items():
                    results += [r for *_, r in round_weights([layer], layer.matrix(), moments, name, choose, overall)]
    return results


def _label(algorithm: Algorithm) -> str:
    args = ", ".join(f"{k}={v}" for k, v in algorithm.args.items())
    return f"{algorithm.name}({args})" if args else algorithm.name


def _function(algorithm: Algorithm) -> Any:
    if algorithm.name not in FUNCTIONS:
        raise ConfigError(
            f"{algorithm.name!r} does not choose one weight at a time", remedy=did_you_mean(algorithm.name, FUNCTIONS)
        )
    if getattr(FUNCTIONS[algorithm.name], ASYMMETRIC):
        raise ConfigError("it is about what the layers before have lost, which are float here", where=algorithm.name,
                          remedy="Compare whole runs.")  # fmt: skip
    check_arguments(algorithm.name, algorithm.args)
    walked = sorted(set(OF_THE_WALK) & set(algorithm.args))
    if walked:
        raise ConfigError(f"{walked[0]} is about the layers before, which are float here", where=algorithm.name,
                          remedy="Leave it out.")  # fmt: skip
    return functools.partial(FUNCTIONS[algorithm.name], **algorithm.args)
