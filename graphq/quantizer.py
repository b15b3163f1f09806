"""TensorQuantizer: observe → fake-quantize → frozen, on one edge of the graph."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from graphq.config.spec import QuantSpec
from graphq.errors import CalibrationError, StateError
from graphq.graph.on_disk import values_of
from graphq.numerics.affine import check_divides, fake_quantize, unmasked_range
from graphq.numerics.scales import BLOCK_KINDS
from graphq.numerics.ste import ceil_through, fake_quantize_through, relative, round_through
from graphq.observers import Observer, make_observer

State = Literal["off", "observe", "quantize", "train"]
Learn = Literal["", "scale", "offset", "threshold"]
SMALLEST_GROWTH = 1e-4  # a scale that training drives below zero would turn the sign of all values


class TensorQuantizer(nn.Module):
    """Quantizes the tensor of one edge. Edges that must share a scale call the same TensorQuantizer.

    spec: what the tensor becomes. block: block shape of its scales. label: what the tensor is, for messages.
    constant: a parameter, whose range is read off once, instead of an activation that calibration observes.
    then: quantizes the result once more, for specs that say so.
    States: "off" passes the tensor through, "observe" also shows it to the observer, "quantize" fake-quantizes it,
        "train" does so with gradients (`trainable`).
    """

    scale: Tensor
    zero_point: Tensor
    overall: Tensor
    growth: nn.Parameter | None  # scale = growth · calibrated scale
    exponent: nn.Parameter | None  # scale = 2^ceil(exponent)
    offset: nn.Parameter | None  # zero point = round(offset)

    def __init__(
        self,
        spec: QuantSpec,
        block: tuple[int, ...],
        label: str,
        *,
        constant: bool = False,
        then: TensorQuantizer | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.block, self.label, self.constant, self.then = spec, block, label, constant, then
        self.state: State = "off"
        self.observer: Observer | None = None
        self.learn: Learn = ""
        self.clip = True
        self.settled = False  # an algorithm has chosen scale and values: ranges are not observed any more
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)
        self.register_buffer("overall", None)
        for learned in ("growth", "exponent", "offset"):
            self.register_parameter(learned, None)

    def extra_repr(self) -> str:
        return f"{self.label}: {self.spec}, {self.state}"

    @property
    def rounding(self) -> dict[str, Any]:
        """What the numerics want to know of the spec beside its format."""
        s = self.spec
        return {"narrow_range": s.narrow_range, "rounding": s.rounding, "saturate": s.saturate}

    def observe(self) -> None:
        """Start over with a fresh observer; a dynamic spec observes the tensor as a whole (local), or nothing."""
        blocks = () if self.spec.dynamic else self.block
        if self.settled:
            return
        self.observer = make_observer(self.spec, blocks) if self.spec.dynamic is not True else None
        self.state = "observe"
        if self.then is not None:
            self.then.observe()

    def update(self, x: Tensor) -> None:
        """Show a tensor to the observer. Raises CalibrationError that names the tensor."""
        if self.settled:
            return
        if not self.spec.ragged and self.block:
            check_divides(x.shape, self.block, self.label)
        try:
            if self.observer is not None:
                self.observer.update(x.detach())
        except CalibrationError as e:
            raise CalibrationError(
                e.what, where=self.label, remedy="Look for the input, or the op before this tensor, that makes them."
            ) from e
        if self.then is not None:
            self.then.update(x)

    def freeze(self, overall: Tensor | None = None) -> None:
        """Fix scale and zero point from what was observed; the observer is let go. overall: the largest magnitude of
        all tensors that share a scale per tensor (kinds of two levels), where there are others."""
        if self.then is not None:
            self.then.freeze()
        if self.settled:
            self.state = "quantize"
            return
        if self.spec.dynamic is True:
            self.observer, self.state = None, "quantize"
            return
        assert self.observer is not None
        try:
            lo, hi = self.observer.range()
        except CalibrationError as e:
            raise CalibrationError(
                e.what, where=self.label, remedy="Give calibration data that runs this part of the model."
            ) from e
        self.overall = torch.maximum(-lo, hi).max() if overall is None else overall
        if self.spec.dynamic:
            self.observer, self.state = None, "quantize"
        else:
            self.set_qparams(*self.spec.choose(lo, hi, self.overall))

    def settle_on(self, scale: Tensor | None, zero_point: Tensor | None = None, overall: Tensor | None = None) -> None:
        """Keep this scale and zero point, one per block, through calibration; the tensor is on their grid. None: be
        calibrated as usual."""
        self.scale, self.zero_point, self.overall, self.settled = scale, zero_point, overall, scale is not None  # type: ignore[assignment]

    def set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take scale (float32) and zero point (int32), one per block, as they are."""
        self.scale, self.zero_point = scale, zero_point
        self.observer, self.state = None, "quantize"

    @property
    def qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero point). Raises StateError before calibration."""
        if self.scale is None:
            raise StateError("this tensor has no scale yet", where=self.label, remedy="Call graphq.calibrate first.")
        if self.state == "train":
            scale, zero_point = self.trained()
            return scale.detach(), zero_point.detach().to(torch.int32)
        return values_of(self.scale), values_of(self.zero_point)

    def trainable(self, learn: Learn, *, clip: bool) -> None:
        """From now on gradients flow. learn: what is trained of the scale: nothing, the scale (LSQ), also the zero
        point ("offset", of affine specs), or the exponent of a power of two ("threshold", TQT)."""
        if self.spec.dynamic or self.spec.scale in BLOCK_KINDS:  # block scales on a grid stay as calibrated
            learn = ""
        elif learn and self.spec.scale in ("pof2", "e8m0", "bfp"):
            learn = "threshold"  # they are powers of two, and stay so
        self.state, self.clip, self.learn = "train", clip, learn
        if self.then is not None:
            self.then.trainable(learn, clip=clip)
        if self.learn == "threshold":
            self.exponent = nn.Parameter(torch.log2(self.scale.detach()))
        elif self.learn:
            self.growth = nn.Parameter(torch.ones_like(self.scale))
        if self.learn == "offset" and not self.spec.symmetric:
            self.offset = nn.Parameter(self.zero_point.detach().float())

    def trained(self) -> tuple[Tensor, Tensor]:
        """(scale, zero point), both float, as functions of what is learned."""
        scale, zero_point = self.scale, self.zero_point.float()
        if self.exponent is not None:
            scale = torch.exp2(ceil_through(self.exponent.clamp(-126, 127)))
        if self.growth is not None:
            scale = relative(scale, self.growth.clamp(min=SMALLEST_GROWTH))
        if self.offset is not None:
            lowest, highest = self.spec.number_format.limits(self.spec.narrow_range)
            zero_point = round_through(self.offset.clamp(lowest, highest))
        return scale, zero_point

    def settle(self) -> None:
        """Fix what was trained: no parameters and no gradients any more."""
        if not self.spec.dynamic:
            self.set_qparams(*(v.clone() for v in self.qparams))
        self.exponent = self.growth = self.offset = None
        self.observer, self.state, self.learn = None, "quantize", ""
        if self.then is not None:
            self.then.settle()

    def qparams_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, zero point) for this very tensor: from its own range where the spec is dynamic."""
        if not self.spec.dynamic:
            return self.qparams
        if not self.spec.ragged and self.block:
            check_divides(x.shape, self.block, self.label)
        return self.spec.choose(*unmasked_range(x.detach(), self.block), overall=self.overall)

    def forward(self, x: Tensor) -> Tensor:
        if self.state == "train":
            if self.observer is not None and not self.constant and self.training:
                self._follow(x)
            scale, zero = self.qparams_for(x) if self.spec.dynamic else self.trained()
            fmt = self.spec.number_format
            x = fake_quantize_through(x, scale, zero.float(), self.block, fmt, clip=self.clip, **self.rounding)
            return x if self.then is None else self.then(x)
        if self.state == "quantize":
            x = fake_quantize(x, *self.qparams_for(x), self.block, self.spec.number_format, **self.rounding)
            return x if self.then is None else self.then(x)
        if self.state == "observe" and not self.constant:
            self.update(x)
        return x

    def _follow(self, x: Tensor) -> None:
        """Let the range follow what the observer has seen so far."""
        self.update(x)
        assert self.observer is not None
        self.scale, self.zero_point = self.spec.choose(*self.observer.range(), overall=self.overall)

    def get_extra_state(self) -> dict[str, Any]:
        return {"state": self.state}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.state = state["state"]


def quantizers(gm: nn.Module) -> dict[str, TensorQuantizer]:
    """Every TensorQuantizer of a graph, by name, each once; one that follows another belongs to that."""
    found = {n: m for n, m in gm.named_modules() if isinstance(m, TensorQuantizer)}
    return {n: q for n, q in found.items() if not (n.endswith(".then") and n.removesuffix(".then") in found)}
