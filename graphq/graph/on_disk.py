"""Tensors that stay on disk until an op needs them.

Such a tensor is a placeholder: of the right shape and dtype, without memory of its own, and NaN in every element, so
that a use that forgets to read it cannot go unseen. `values_of` reads what it stands for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graphq.errors import LoadError

SOURCE = "graphq_source"  # attribute of a placeholder


class Source(Protocol):
    """Where a tensor is."""

    def read(self) -> Tensor:
        """The tensor, from disk."""


@dataclass(frozen=True)
class InFile:
    """A tensor of a safetensors file, as float32."""

    path: Path
    key: str

    def read(self) -> Tensor:
        try:
            with safe_open(self.path, framework="pt") as file:  # closed again: what was read is not kept mapped
                return file.get_tensor(self.key).float()
        except (OSError, SafetensorError) as e:
            raise LoadError(f"the weights cannot be read: {e}", where=f"{self.path}: {self.key}") from e


@dataclass(frozen=True)
class Scaled:
    """A tensor on disk times factors, or divided by them, which go with it by broadcasting."""

    source: Source
    factors: Tensor
    divide: bool

    def read(self) -> Tensor:
        values = self.source.read()
        factors = self.factors.to(values.device)
        return values / factors if self.divide else values * factors


def digest_of(tensor: Tensor) -> str:
    """Of values and shape."""
    values = values_of(tensor).detach().cpu().float().contiguous()
    digest = hashlib.sha256(f"{list(values.shape)}".encode())
    digest.update(values.numpy().data)  # as it lies in memory: an embedding's bytes are many
    return digest.hexdigest()


def scaled(tensor: Tensor, factors: Tensor, *, divide: bool = False) -> Tensor:
    """The tensor times factors, or divided by them, in its dtype; one on disk stays there."""
    source: Source | None = getattr(tensor, SOURCE, None)
    if source is not None:
        return placeholder(tensor.shape, Scaled(source, factors, divide), tensor.dtype, tensor.device)
    return (tensor.detach() / factors if divide else tensor.detach() * factors).to(tensor.dtype)


def placeholder(
    shape: Sequence[int], source: Source, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """A tensor that stands for one on disk, and is wanted on this device."""
    value = float("nan") if dtype.is_floating_point else 0
    empty = torch.full((), value, dtype=dtype, device=device).expand(tuple(shape))
    setattr(empty, SOURCE, source)
    return empty


def on_disk(tensor: Tensor) -> bool:
    """Is this a placeholder?"""
    return hasattr(tensor, SOURCE)


def values_of(tensor: Tensor) -> Tensor:
    """The tensor itself, or what it stands for, read from disk."""
    source: Source | None = getattr(tensor, SOURCE, None)
    return tensor if source is None else source.read().to(tensor.device)
