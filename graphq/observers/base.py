"""What an observer is: it sees tensors and says which range the codes shall cover."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from graphq.config.spec import QuantSpec
from graphq.errors import CalibrationError, ConfigError
from graphq.numerics.affine import MASK_VALUE
from graphq.registry import Registry


class Observer(Protocol):
    """Sees any number of tensors in bounded memory. `block` is the block shape of `graphq.numerics.affine`."""

    def __init__(self, spec: QuantSpec, block: tuple[int, ...], **options: Any) -> None: ...

    def update(self, x: Tensor) -> None:
        """See one more tensor. Raises CalibrationError for NaN."""

    def merge(self, other: Any) -> None:
        """Take in what another observer of the same kind has seen (data-parallel calibration)."""

    def range(self) -> tuple[Tensor, Tensor]:
        """(lo, hi) per block, zero included. Raises CalibrationError when nothing has been seen."""


OBSERVERS: Registry[type[Observer]] = Registry("observer", "graphq.observers")


def make_observer(spec: QuantSpec, block: tuple[int, ...]) -> Observer:
    """The observer that a spec names, with its arguments. Raises ConfigError for arguments that it does not take."""
    cls = OBSERVERS[spec.observer]
    try:
        return cls(spec, block, **spec.observer_args)
    except TypeError as e:
        raise ConfigError(str(e), where=f"observer {spec.observer!r}", remedy="See docs/configuration.md.") from e


def finite_range(x: Tensor) -> tuple[Tensor, float, float]:
    """(x without mask values, its minimum, its maximum). Raises CalibrationError for NaN and +inf."""
    if x.numel() == 0:
        return x, 0.0, 0.0
    lo, hi = (v.item() for v in torch.aminmax(as_stored(x)))
    if lo != lo:
        raise CalibrationError(f"{int(x.isnan().sum())} of {x.numel()} values are NaN")
    if lo <= MASK_VALUE:
        x = x[x > MASK_VALUE]
        return finite_range(x)
    if hi == float("inf"):
        raise CalibrationError("a value is +inf")
    return x, lo, hi


def as_stored(x: Tensor) -> Tensor:
    """Its dimensions in the order of memory, so that flattening or reducing a channels-last tensor copies nothing."""
    return x if x.is_contiguous() else x.permute(sorted(range(x.ndim), key=x.stride, reverse=True))


def nothing_seen() -> CalibrationError:
    return CalibrationError("no calibration data has reached this tensor")
