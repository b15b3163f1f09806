"""Scheme: the specs of one layer."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from graphq.config.readable import ConfigModel
from graphq.config.spec import QuantSpec


class Scheme(ConfigModel):
    """What happens to the weight, the inputs, the output and the bias of one layer. None leaves a tensor float."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: QuantSpec | None = Field(None, description="Parameters: convolution, linear and embedding weights.")
    input: QuantSpec | None = Field(None, description="Activations that enter the layer.")
    output: QuantSpec | None = Field(
        None, description="Activations that leave the layer; None: as the consumers and the target's kernel ask."
    )
    cache: QuantSpec | None = Field(
        None, description="Keys and values that enter attention, as a KV cache keeps them; None: as input says."
    )
    bias: QuantSpec | None = Field(
        None, description="The bias; None: int32 with scale input·weight where the kernel wants it."
    )

    def __str__(self) -> str:
        parts = [
            f"{k} {v}"
            for k, v in (("w", self.weight), ("in", self.input), ("out", self.output), ("kv", self.cache))
            if v
        ]
        return ", ".join(parts) or "float"
