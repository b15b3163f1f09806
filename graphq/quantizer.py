"""TensorQuantizer: observe → fake-quantize → frozen, on one edge of the graph."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from graphq.config.spec import QuantSpec
from graphq.errors import CalibrationError, StateError
from graphq.numerics.affine import fake_quantize
from graphq.numerics.scales import choose_qparams
from graphq.observers import Observer, make_observer

State = Literal["off", "observe", "quantize"]


class TensorQuantizer(nn.Module):
    """Quantizes the tensor of one edge. Edges that must share a scale call the same TensorQuantizer.

    spec: what the tensor becomes. block: block shape of its scales. label: what the tensor is, for messages.
    constant: a parameter, whose range is read off once, instead of an activation that calibration observes.
    States: "off" passes the tensor through, "observe" also shows it to the observer, "quantize" fake-quantizes it.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantSpec, block: tuple[int, ...], label: str, *, constant: bool = False) -> None:
        super().__init__()
        self.spec, self.block, self.label, self.constant = spec, block, label, constant
        self.state: State = "off"
        self.observer: Observer | None = None
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)

    def extra_repr(self) -> str:
        return f"{self.label}: {self.spec}, {self.state}"

    def observe(self) -> None:
        """Start over with a fresh observer."""
        self.observer = make_observer(self.spec, self.block)
        self.state = "observe"

    def update(self, x: Tensor) -> None:
        """Show a tensor to the observer. Raises CalibrationError that names the tensor."""
        assert self.observer is not None
        try:
            self.observer.update(x.detach())
        except CalibrationError as e:
            raise CalibrationError(
                e.what, where=self.label, remedy="Look for the input, or the op before this tensor, that makes them."
            ) from e

    def freeze(self) -> None:
        """Fix scale and zero point from what was observed; the observer is let go."""
        assert self.observer is not None
        try:
            lo, hi = self.observer.range()
        except CalibrationError as e:
            raise CalibrationError(
                e.what, where=self.label, remedy="Give calibration data that runs this part of the model."
            ) from e
        self.set_qparams(
            *choose_qparams(
                lo,
                hi,
                self.spec.number_format,
                symmetric=self.spec.symmetric,
                narrow_range=self.spec.narrow_range,
            )
        )

    def set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take scale (float32) and zero point (int32), one per block, as they are."""
        self.scale, self.zero_point = scale, zero_point
        self.observer, self.state = None, "quantize"

    @property
    def qparams(self) -> tuple[Tensor, Tensor]:
        """(scale, zero point). Raises StateError before calibration."""
        if self.scale is None:
            raise StateError("this tensor has no scale yet", where=self.label, remedy="Call graphq.calibrate first.")
        return self.scale, self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        if self.state == "quantize":
            return fake_quantize(
                x,
                self.scale,
                self.zero_point,
                self.block,
                self.spec.number_format,
                narrow_range=self.spec.narrow_range,
            )
        if self.state == "observe" and not self.constant:
            self.update(x)
        return x

    def get_extra_state(self) -> dict[str, Any]:
        return {"state": self.state}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.state = state["state"]


def quantizers(gm: nn.Module) -> dict[str, TensorQuantizer]:
    """Every TensorQuantizer of a graph, by name, each once."""
    return {n: m for n, m in gm.named_modules() if isinstance(m, TensorQuantizer)}
