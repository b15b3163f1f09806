"""Observers see data."""

from graphq.calibration.runner import batches_of, run_calibration

__all__ = ["batches_of", "run_calibration"]
