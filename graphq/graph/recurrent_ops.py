"""One direction of one LSTM layer: in float, simulated, and as ONNX Runtime's DynamicQuantizeLSTM computes it.

    lstm(x, weight, recurrent, bias, h, c, reverse, rounds)                         simulated, or float
    dynamic_lstm(x, w, w_scale, w_zero, r, r_scale, r_zero, bias, h, c, reverse)    the kernel

x: float32 [steps, batch, in]; h, c: float32 [batch, hidden], before the first step. weight: [4·hidden, in], recurrent:
[4·hidden, hidden], bias: [4·hidden], gates in torch's order: input, forget, cell, output. w: codes [in, 4·hidden], r:
codes [hidden, 4·hidden], their scales and zero points [4·hidden], gates in ONNX's order: input, output, forget, cell;
so is the bias. The results are the state after every step [steps, batch, hidden], and the last h and c.

The kernel rounds x once, and the state at every step, to uint8 as DynamicQuantizeLinear does: one scale for the whole
batch. (With several threads and several rows ONNX Runtime gives each thread rows, and finds scales for those alone.)
`rounds` does that to the state; x has a quantizer of its own in a simulation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphq.graph.dynamic_ops import dynamic_qgemm, dynamic_uint8

State = tuple[Tensor, Tensor, Tensor]
TO_ONNX = (0, 3, 1, 2)  # the order of the gates
OF_ONNX = (0, 2, 3, 1)


def reorder(rows: Tensor, order: tuple[int, ...]) -> Tensor:
    """Four gates along the first axis, in another order."""
    gates = rows.chunk(4)
    return torch.cat([gates[i] for i in order])


def _rounded(state: Tensor) -> Tensor:
    centered, scale, _ = dynamic_uint8(state)
    return centered * scale


@torch.library.custom_op("graphq::lstm", mutates_args=())
def lstm(
    x: Tensor, weight: Tensor, recurrent: Tensor, bias: Tensor | None, h: Tensor, c: Tensor,
    reverse: bool = False, rounds: bool = False,
) -> State:  # fmt: skip
    if rounds:
        return _steps(x @ weight.t(), lambda state: _rounded(state) @ recurrent.t(), bias, h, c, reverse)
    given = torch.zeros_like(recurrent[:, 0]) if bias is None else bias
    flat = [weight, recurrent, given, torch.zeros_like(given)]
    y, last_h, last_c = torch.lstm(
        x.flip(0) if reverse else x, [h[None], c[None]], flat, True, 1, 0.0, False, False, False
    )
    return (y.flip(0) if reverse else y.clone()), last_h[0].clone(), last_c[0].clone()


@torch.library.custom_op("graphq::dynamic_lstm", mutates_args=())
def dynamic_lstm(
    x: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor, r: Tensor, r_scale: Tensor, r_zero: Tensor,
    bias: Tensor | None, h: Tensor, c: Tensor, reverse: bool = False,
) -> State:  # fmt: skip
    def product(state: Tensor) -> Tensor:
        gates: Tensor = dynamic_qgemm(state, r, r_scale, r_zero, None)
        return reorder(gates.t(), OF_ONNX).t()

    inputs = reorder(dynamic_qgemm(x, w, w_scale, w_zero, None).movedim(-1, 0), OF_ONNX).movedim(0, -1)
    return _steps(inputs, product, None if bias is None else reorder(bias, OF_ONNX), h, c, reverse)


def _steps(inputs: Tensor, product, bias: Tensor | None, h: Tensor, c: Tensor, reverse: bool) -> State:  # type: ignore[no-untyped-def]
    """inputs: what x adds to the gates of every step [steps, batch, 4·hidden]. product: what a state adds to them."""
    states = []
    for gates in inputs.flip(0) if reverse else inputs:
        gates = gates + product(h)
        i, f, g, o = (gates if bias is None else gates + bias).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(h)
    if not states:
        return inputs.new_zeros(0, *h.shape), h.clone(), c.clone()
    return torch.stack(states[::-1] if reverse else states), h.clone(), c.clone()


@lstm.register_fake
def _(
    x: Tensor, weight: Tensor, recurrent: Tensor, bias: Tensor | None, h: Tensor, c: Tensor,
    reverse: bool = False, rounds: bool = False,
) -> State:  # fmt: skip
    return x.new_empty(x.shape[0], *h.shape), torch.empty_like(h), torch.empty_like(c)


@dynamic_lstm.register_fake
def _(
    x: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor, r: Tensor, r_scale: Tensor, r_zero: Tensor,
    bias: Tensor | None, h: Tensor, c: Tensor, reverse: bool = False,
) -> State:  # fmt: skip
    return x.new_empty(x.shape[0], *h.shape), torch.empty_like(h), torch.empty_like(c)


LSTM = torch.ops.graphq.lstm.default
DYNAMIC_LSTM = torch.ops.graphq.dynamic_lstm.default
