"""Decision: what annotate writes on every op, and explain prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, fx

from graphq.config.spec import QuantSpec

Action = Literal["quantize", "weight_only", "carry", "fuse", "float", "skip"]
KEY = "graphq"  # under which a node's meta keeps its decision


@dataclass
class Decision:
    """What happens to one op, and why.

    action: "quantize" (integer inputs), "weight_only", "carry" (runs on the codes of its input), "fuse" (computed
        inside another op's kernel), "float", or "skip" (shapes, indices and masks: never quantized).
    kernel: the runtime op that will compute it. head: for "fuse", the op whose kernel takes it in.
    members: all ops of the kernel, the last one first. inputs: producer → spec of each edge to quantize.
    output: spec of the result, where the kernel needs one. original: the weight before an algorithm chose its values,
        unless these make good what the op's inputs have lost, so that its products are not to be those of the weight.
    more_weights: of an op with several; they take the weight's spec too.
    """

    action: Action
    reason: str
    rule: str = ""
    pattern: str = ""
    kernel: str = ""
    head: fx.Node | None = None
    members: list[fx.Node] = field(default_factory=list)
    inputs: dict[fx.Node, QuantSpec] = field(default_factory=dict)
    weight: fx.Node | None = None
    weight_spec: QuantSpec | None = None
    weight_axis: int | tuple[int, ...] = 0
    more_weights: list[fx.Node] = field(default_factory=list)
    bias: fx.Node | None = None
    bias_form: str = "float"
    output: QuantSpec | None = None
    original: Tensor | None = None

    def to_float(self, reason: str) -> None:
        """Veto: leave the op float."""
        self.action, self.reason, self.kernel = "float", reason, ""
        self.inputs, self.weight_spec, self.output = {}, None, None


def decision_of(node: fx.Node) -> Decision | None:
    """The decision on a node, once annotate has run."""
    return node.meta.get(KEY)
