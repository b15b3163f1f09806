"""QuantSpec: what one tensor becomes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from graphq.config.readable import ConfigModel
from graphq.numerics.formats import Format, get_format

Granularity = Literal["tensor", "channel", "group", "block"]


class QuantSpec(ConfigModel):
    """How one tensor is quantized: number format, how scales are shared, and who finds the range."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str = Field("int8", description="Number format: int2 … int16, uint2 … uint16, int32.")
    symmetric: bool = Field(True, description="Zero point in the middle of the format; otherwise an affine range.")
    granularity: Granularity = Field("tensor", description="What shares a scale: tensor, channel, group or block.")
    axis: int | None = Field(
        None,
        description="Channel axis (channel), or the axis along which groups run (group). "
        "None: the output channels of a weight, the last axis of groups.",
    )
    group_size: int | None = Field(None, gt=0, description="Elements per group, for granularity group.")
    block: tuple[int, ...] | None = Field(None, description="Elements per block and dimension, for granularity block.")
    observer: str = Field("minmax", description="Who finds the range: a registered observer.")
    observer_args: dict[str, Any] = Field(default_factory=dict, description="Arguments of the observer.")
    dynamic: bool = Field(False, description="Find the range anew at every call, instead of by calibration.")
    narrow_range: bool = Field(False, description="Leave out the lowest code of a signed format (-128 of int8).")
    rounding: Literal["half_even"] = Field("half_even", description="How ties round.")

    @model_validator(mode="after")
    def _consistent(self) -> QuantSpec:
        get_format(self.format)
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("group_size belongs to granularity 'group', and is needed there")
        if (self.granularity == "block") != (self.block is not None):
            raise ValueError("block belongs to granularity 'block', and is needed there")
        if self.dynamic and self.granularity != "tensor":
            raise ValueError("a dynamic range is found per tensor")
        return self

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def number_format(self) -> Format:
        return get_format(self.format)

    def block_for(self, rank: int, channel_axis: int = 0) -> tuple[int, ...]:
        """The block shape (see `graphq.numerics.affine`) of this spec for a tensor of that rank.

        channel_axis: the output-channel axis of the op that uses the tensor; `axis`, where set, wins.
        """
        if self.granularity == "tensor":
            return ()
        if self.granularity == "block":
            assert self.block is not None
            return tuple(self.block)
        shape = [-1] * rank
        if self.granularity == "channel":
            shape[channel_axis if self.axis is None else self.axis] = 1
            return tuple(shape)
        assert self.group_size is not None
        shape = [1] * rank
        shape[-1 if self.axis is None else self.axis] = self.group_size
        return tuple(shape)

    def __str__(self) -> str:
        parts = [self.format, "sym" if self.symmetric else "affine", self.granularity]
        if self.group_size:
            parts[-1] += str(self.group_size)
        if self.dynamic:
            parts.append("dynamic")
        return " ".join(parts)
