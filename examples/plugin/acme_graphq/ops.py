"""acme::swiglu: the gate and the up projection of a gated MLP in one product.

swiglu(x […, in], weight [2·hidden, in], bias [2·hidden]) = silu(a) · b,  [a, b] = x · weightᵀ + bias
gate(h […, 2·hidden]) = silu(a) · b,  [a, b] = h
"""

import torch
from torch import Tensor, nn


@torch.library.custom_op("acme::gate", mutates_args=())
def gate(h: Tensor) -> Tensor:
    a, b = h.chunk(2, -1)
    return nn.functional.silu(a) * b


@gate.register_fake
def _(h: Tensor) -> Tensor:
    return h.new_empty(*h.shape[:-1], h.shape[-1] // 2)


@torch.library.custom_op("acme::swiglu", mutates_args=())
def swiglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return gate(nn.functional.linear(x, weight, bias))


@swiglu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


SWIGLU, GATE = torch.ops.acme.swiglu.default, torch.ops.acme.gate.default


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)), as Llama has it, with gate and up in one weight."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(features, 2 * hidden)
        self.down = nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(SWIGLU(x, self.gate_up.weight, self.gate_up.bias))
