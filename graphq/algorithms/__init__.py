"""Algorithms that prepare weights for quantization, by name: `QuantConfig(algorithms=["smoothquant"])`."""

from graphq.algorithms import adaround, autoround, awq, equalization, fpi_gptq, gptaq, gptq, rtn, smoothquant
from graphq.algorithms.base import ALGORITHMS, Run
from graphq.algorithms.sequential import weight_algorithm

__all__ = [
    "ALGORITHMS",
    "Run",
    "adaround",
    "autoround",
    "awq",
    "equalization",
    "fpi_gptq",
    "gptaq",
    "gptq",
    "rtn",
    "smoothquant",
    "weight_algorithm",
]
