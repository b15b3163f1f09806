"""Weights that stay packed in an eager model, and are dequantized when a layer uses them.

They are parametrizations (`torch.nn.utils.parametrize`): the layers keep their classes and their code, whatever these
are, and `state_dict` has the codes in place of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from graphq.algorithms.rows import weight_of
from graphq.errors import StateError
from graphq.numerics.affine import dequantize
from graphq.numerics.formats import Format
from graphq.numerics.packing import pack, unpack

CONTAINERS = (2, 4)  # bits of codes that share a byte
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # by bytes


class Packed(nn.Module):
    """The weight of a layer, from its codes.

    codes: as `quantize` gives them, of the weight, or of it as a matrix of that family of ops (`rows.matrix_of`).
    scale, zero_point: one per block of them. shape: of the weight; turned: the model has its transpose.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor, block: Sequence[int], fmt: Format,
        shape: Sequence[int], family: str = "linear", *, turned: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.block, self.format, self.turned, self.family = tuple(block), fmt, turned, family
        self.shape, self.wide, self.storage = tuple(shape), codes.shape, codes.dtype
        self.bits = next((b for b in CONTAINERS if fmt.bits <= b), 0)  # 0: each in its own storage
        self.packed: Tensor | None = self._packed(codes)
        self.dtype = torch.float32
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", once(zero_point))

    def forward(self, packed: Tensor) -> Tensor:
        codes = packed if self.bits else packed.view(self.storage)
        if self.bits:
            codes, above = unpack(packed, self.bits, self.wide.numel()).reshape(self.wide), 8 - self.bits
            if self.storage.is_signed:  # the highest bit of the container says so
                codes = (codes << above).view(self.storage) >> above
        zero = self.zero_point.expand_as(self.scale)
        matrix = dequantize(codes, self.scale, zero, self.block, self.format)
        weight = weight_of(matrix, self.shape, self.family).to(self.dtype)
        return weight.T if self.turned else weight

    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:
        """The codes, while they are put into a layer."""
        if self.packed is None:
            raise StateError(
                "a packed weight has its codes, and takes no other values",
                where=str(list(weight.shape)),
                remedy="torch.nn.utils.parametrize.remove_parametrizations(layer, name) makes it float.",
            )
        self.dtype = weight.dtype
        return (self.packed,)

    def put_into(self, model: nn.Module, parameter: nn.Parameter) -> None:
        """In place of a parameter, everywhere that the model has it."""
        assert self.packed is not None
        self.to(parameter.device)
        self.packed = self.packed.to(parameter.device)
        codes: nn.Parameter | None = None
        for module in list(model.modules()):
            for leaf, value in list(module._parameters.items()):
                if value is not parameter:
                    continue
                value.requires_grad_(False)
                parametrize.register_parametrization(module, leaf, self, unsafe=True)
                held: Any = module.parametrizations[leaf]  # type: ignore[index, union-attr]
                held.original0 = codes = codes if codes is not None else held.original0  # tied, wherever the model goes
        self.packed = None  # the layers have it

    def _packed(self, codes: Tensor) -> Tensor:
        if not self.bits:  # small floats as integers, so that nobody casts them
            return codes.clone().view(INTEGERS[codes.element_size()])
        return pack(codes.reshape(-1).to(torch.int16) & ((1 << self.bits) - 1), self.bits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        """The model goes elsewhere, or becomes another dtype: then the weight does, and the scales stay as they are."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device)).dtype

        def elsewhere(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(elsewhere, recurse)  # type: ignore[no-any-return]


def once(zero_point: Tensor) -> Tensor:
    """One value where all are the same."""
    same = bool((zero_point == zero_point.reshape(-1)[0]).all())
    return (zero_point.reshape(-1)[:1].reshape([1] * zero_point.ndim) if same else zero_point).clone()
