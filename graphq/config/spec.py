"""QuantSpec: what one tensor becomes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from graphq.config.readable import ConfigModel
from graphq.errors import ConfigError
from graphq.numerics.formats import BLOCK_FORMATS, Format, Integer, SharedExponents, get_format
from graphq.numerics.rounding import Rounding
from graphq.numerics.scales import BLOCK_KINDS, TWO_LEVEL, ScaleKind, ScaleMode, Span, choose_qparams

Granularity = Literal["tensor", "channel", "group", "block", "token", "head"]
HEAD_AXIS = 1  # of attention tensors [batch, head, token, channel]


class QuantSpec(ConfigModel):
    """How one tensor is quantized: number format, how scales are shared, and who finds the range."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str = Field(
        "int8",
        description="Number format of the table of formats. A block format ('mxfp4', 'nvfp4', …) stands for its "
        "element format, group size and kind of scale.",
    )
    symmetric: bool = Field(True, description="Zero point in the middle of the format; otherwise an affine range.")
    granularity: Granularity = Field(
        "tensor",
        description="What shares a scale: tensor, channel, group, block, token (all but the last dimension) or head "
        "(the second dimension).",
    )
    axis: int | None = Field(
        None,
        description="Channel axis (channel), or the axis along which groups run (group). "
        "None: the output channels of a weight, the last axis of groups.",
    )
    group_size: int | None = Field(None, gt=0, description="Elements per group, for granularity group.")
    block: tuple[int, ...] | None = Field(None, description="Elements per block and dimension, for granularity block.")
    ragged: bool = Field(
        False, description="Let the last group or block be filled up with zeros; else a size that is no multiple fails."
    )
    observer: str = Field("minmax", description="Who finds the range: a registered observer.")
    observer_args: dict[str, Any] = Field(default_factory=dict, description="Arguments of the observer.")
    dynamic: bool | Literal["local"] = Field(
        False,
        description="Find the range anew at every call, instead of by calibration. 'local': of blocks; the scale of "
        "the tensor over them (scale 'e4m3' or 'e5m3_global') is calibrated.",
    )
    narrow_range: bool = Field(False, description="Leave out the lowest code of a signed format (-128 of int8).")
    rounding: Rounding = Field("half_even", description="How values between two codes round.")
    saturate: bool = Field(True, description="Float formats: what is too large becomes the largest value.")
    scale: ScaleKind = Field(
        "float",
        description="Kind of scale: any float, power of two (pof2, e8m0, bfp), e5m3, or over a tensor scale "
        "(e4m3, e5m3_global).",
    )
    scale_mode: ScaleMode = Field(
        "even",
        description="How e8m0 rounds the exponent: floor (OCP), ceil, even, cover.",
    )
    span: Span = Field(
        "positive", description="Symmetric: divide the range by the largest code, or ('full') by half of all codes."
    )
    then: QuantSpec | None = Field(
        None, description="Quantize the result once more: W4A8 computes in fp8 what was stored as int4."
    )

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, data: Any) -> Any:
        """A block format stands for the fields that define it."""
        if isinstance(data, dict) and data.get("format") in BLOCK_FORMATS:
            parts = BLOCK_FORMATS[data["format"]]
            return parts | data | {"format": parts["format"]}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> QuantSpec:
        fmt = get_format(self.format)
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("group_size belongs to granularity 'group', and is needed there")
        if (self.granularity == "block") != (self.block is not None):
            raise ValueError("block belongs to granularity 'block', and is needed there")
        if not self.symmetric and not isinstance(fmt, Integer):
            raise ValueError(f"{self.format} has no zero point: it is symmetric")
        if not self.symmetric and self.scale not in ("float", "pof2"):
            raise ValueError(f"scales of kind {self.scale!r} have no zero point: they are symmetric")
        if self.granularity == "token" and self.dynamic is not True:
            raise ValueError("the number of tokens is not known before the call: granularity 'token' is dynamic")
        if self.dynamic and self.granularity in ("channel", "block", "head"):
            raise ValueError("a dynamic range is found per tensor, token or group")
        if self.dynamic == "local" and self.scale not in TWO_LEVEL:
            raise ValueError(
                f"dynamic 'local' is for scales of kind {' or '.join(TWO_LEVEL)}, with a scale of the tensor over them"
            )
        if self.scale in BLOCK_KINDS and self.granularity not in ("group", "block"):
            raise ValueError(f"scales of kind {self.scale!r} are those of groups or blocks")
        if isinstance(fmt, SharedExponents) and self.scale != "e8m0":
            raise ValueError(f"{self.format} has scales of kind 'e8m0'")
        return self

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def number_format(self) -> Format:
        return get_format(self.format)

    def choose(self, lo: Tensor, hi: Tensor, overall: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(scale, zero point) for a range per block. overall: the largest magnitude of the tensor, for scales of two
        levels; without it, as while ranges are searched, these are taken for floats."""
        kind = "float" if self.scale in TWO_LEVEL and overall is None else self.scale
        return choose_qparams(
            lo, hi, self.number_format, symmetric=self.symmetric, narrow_range=self.narrow_range,
            scale=kind, mode=self.scale_mode, span=self.span, overall=overall,
        )  # fmt: skip

    def block_for(self, rank: int, channel_axis: int | tuple[int, ...] = 0) -> tuple[int, ...]:
        """The block shape (see `graphq.numerics.affine`) of this spec for a tensor of that rank.

        channel_axis: the output-channel axis, or axes, of the op that uses the tensor; `axis`, where set, wins.
        """
        if self.granularity == "tensor":
            return ()
        if self.granularity == "token":
            return (*[1] * (rank - 1), -1)
        if self.granularity == "block":
            assert self.block is not None
            if len(self.block) != rank:
                raise ConfigError(
                    f"blocks of {list(self.block)} do not fit a tensor with {rank} dimensions",
                    remedy="Let the rule select other layers, or give a block with an entry per dimension.",
                )
            return tuple(self.block)
        shape = [-1] * rank
        if self.granularity in ("channel", "head"):
            usual = HEAD_AXIS if self.granularity == "head" else channel_axis
            axes = usual if self.axis is None else self.axis
            for axis in (axes,) if isinstance(axes, int) else axes:
                shape[axis] = 1
            return tuple(shape)
        assert self.group_size is not None
        shape = [1] * rank
        shape[-1 if self.axis is None else self.axis] = self.group_size
        return tuple(shape)

    def __str__(self) -> str:
        parts = [self.format, "sym" if self.symmetric else "affine", self.granularity]
        if self.group_size:
            parts[-1] += str(self.group_size)
        if self.scale != "float":
            parts.append(f"{self.scale} scales")
        if self.dynamic:
            parts.append("dynamic" if self.dynamic is True else "dynamic in blocks")
        return " ".join(parts) + (f", then {self.then}" if self.then else "")
