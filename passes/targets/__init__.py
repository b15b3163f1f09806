"""Targets: what a runtime's kernels accept, as data."""

import inspect

from graphq.errors import TargetError, did_you_mean

from . import onnx, onnxruntime, openvino, simulation, tensorrt, torch_compile
from .table import TARGETS, Kernel, Target


def options_of(target: str) -> list[str]:
    """The options of a target."""
    return list(inspect.signature(TARGETS[target]).parameters)


def get_target(target: Target | str, **options: str) -> Target:
    """A target by name, `get_target("onnxruntime", cpu="avx2")`; raises ConfigError with the nearest names,
    TargetError for options that it does not have."""
    if isinstance(target, Target):
        return target
    known = options_of(target)
    for option in options:
        if option not in known:
            remedy = did_you_mean(option, known) if known else "It has none."
            raise TargetError(f"{option!r} is no option of target {target!r}", remedy=remedy)
    return TARGETS[target](**options)


__all__ = [
    "TARGETS",
    "Kernel",
    "Target",
    "get_target",
    "onnx",
    "onnxruntime",
    "openvino",
    "simulation",
    "tensorrt",
    "torch_compile",
]
