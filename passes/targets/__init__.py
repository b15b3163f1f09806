"""Targets: what a runtime's kernels accept, as data."""

from . import onnx, onnxruntime, simulation
from .table import TARGETS, Kernel, Target


def get_target(target: Target | str, **options: str) -> Target:
    """A target by name, `get_target("onnxruntime", cpu="avx2")`; raises ConfigError with the nearest names."""
    return target if isinstance(target, Target) else TARGETS[target](**options)


__all__ = ["TARGETS", "Kernel", "Target", "get_target", "onnx", "onnxruntime", "simulation"]
