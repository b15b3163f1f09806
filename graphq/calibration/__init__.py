"""Observers see data."""

from graphq.calibration.batches import batches_of
from graphq.calibration.runner import run_calibration

__all__ = ["batches_of", "run_calibration"]
