"""What is quantized together. At one op the first pattern of the list that fits counts."""

from .base import QuantPattern
from .elementwise import COMPUTING, MOVING, Add, AddActivation, Attention, Concat, Matmul, Mul, Where
from .weighted import (
    Conv,
    ConvActivation,
    ConvTranspose,
    Embedding,
    Experts,
    Linear,
    LinearActivation,
    Lstm,
    PaddedConv,
    PaddedConvActivation,
)

PATTERNS: list[type[QuantPattern]] = [
    PaddedConvActivation,
    ConvActivation,
    LinearActivation,
    AddActivation,
    PaddedConv,
    Conv,
    ConvTranspose,
    Linear,
    Experts,
    Embedding,
    Lstm,
    Matmul,
    Add,
    Mul,
    Concat,
    Where,
    Attention,
    *COMPUTING,
    *MOVING,
]

__all__ = ["PATTERNS", "QuantPattern"]
