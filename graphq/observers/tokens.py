"""Which tokens of a batch count: those of padding are computed, and say nothing of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from graphq.graph.optable import family_of
from graphq.graph.view import value_of

MASK = "attention_mask"  # an input of that name says which tokens count


class TokenMask(nn.Module):
    """Remembers which tokens of the batch that runs count, [n, length]."""

    value: Tensor | None = None

    def forward(self, mask: Tensor | None) -> None:
        self.value = tokens_that_count(mask)


def tokens_that_count(mask: Any) -> Tensor | None:
    """[n, length] of an input of that name, if it is such a mask: no other constant, and none that is added."""
    if not isinstance(mask, Tensor) or mask.ndim != 2 or (mask.is_floating_point() and bool((mask < 0).any())):
        return None
    return mask.detach().bool()


MaskWatchers = Sequence[tuple[fx.Node, "TokenMask | _Flat"]]


def mask_watchers(gm: fx.GraphModule) -> list[tuple[fx.Node, TokenMask]]:
    """For the input that says which tokens count, if there is one. They come before the watchers that want to know."""
    return [(n, TokenMask()) for n in gm.graph.find_nodes(op="placeholder") if n.target == MASK]


class _Flat:
    """A mask whose tokens have been flattened, [n · length]."""

    def __init__(self, mask: TokenMask | _Flat) -> None:
        self.mask = mask

    @property
    def value(self) -> Tensor | None:
        return None if self.mask.value is None else self.mask.value.reshape(-1)


def masks_for(node: fx.Node, masks: MaskWatchers) -> MaskWatchers:
    """As the rows of this tensor are."""
    return [(n, _Flat(mask)) for n, mask in masks] if flattened(node) else masks


def flattened(node: fx.Node) -> bool:
    """Are the rows of this tensor [n · length, channels] the tokens of [n, length, channels], in their order?"""
    if family_of(node.target) != "reshape":
        return False
    before, after = (value_of(n) for n in (node.all_input_nodes[0], node))
    return before.ndim == 3 and after.ndim == 2 and str(before.shape[-1]) == str(after.shape[-1])


def mask_of(watchers: MaskWatchers) -> Tensor | None:
    """Of the batch that runs."""
    return next((mask.value for _, mask in watchers), None)


def counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """[n, length, channels] → rows [m, channels] of the tokens that count. Of tensors of another shape than the mask
    all rows do: in which order tokens lie there is not known."""
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask]
    return x.reshape(-1, x.shape[-1])
