"""Algorithms that prepare weights for quantization, by name: `QuantConfig(algorithms=["smoothquant"])`."""

from graphq.algorithms import gptq, rtn, smoothquant
from graphq.algorithms.base import ALGORITHMS, Run

__all__ = ["ALGORITHMS", "Run", "gptq", "rtn", "smoothquant"]
