"""Observers: who finds the range of a tensor. Each sees any amount of data in bounded memory, and merges."""

from graphq.observers.base import OBSERVERS, Observer, make_observer
from graphq.observers.fixed import Fixed
from graphq.observers.minmax import MinMax, MovingAverage
from graphq.observers.mse_grid import MseGrid
from graphq.observers.percentile import Percentile
from graphq.observers.search import Entropy, MeanSquaredError

__all__ = [
    "OBSERVERS",
    "Entropy",
    "Fixed",
    "MeanSquaredError",
    "MinMax",
    "MovingAverage",
    "MseGrid",
    "Observer",
    "Percentile",
    "make_observer",
]
