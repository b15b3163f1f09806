"""explain: a row for every op of a graph: what was decided, by which rule, why, and which kernel computes it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from graphq.errors import StateError, did_you_mean
from graphq.evaluate.inductor import FoundInInductor
from graphq.evaluate.openvino import FoundInOpenVino
from graphq.evaluate.taps import load_model, optimized_model
from graphq.graph.decision import Decision, decision_of
from graphq.graph.ops import QUANTIZE, is_quantization
from graphq.graph.several import expect_one
from graphq.graph.view import LayerView
from graphq.report.cost import shares

INTEGER_PREFIXES = ("QLinear", "QGemm", "QAttention", "MatMulInteger", "DynamicQuantizeMatMul", "ConvInteger")
SAME_MOVE = {  # an op that only moves data may be written in several ways
    "Reshape": {"Reshape", "Flatten", "Squeeze", "Unsqueeze"},
    "Slice": {"Slice", "Gather"},
    "Gather": {"Gather", "GatherElements"},
}


@dataclass
class Row:
    """One op. predicted: the kernel by the target's table, "float" without an integer one. found: the op in ONNX
    Runtime's optimized model that makes the same tensor, "fused" where no node of its own is left. share: of the
    estimated time of the whole model, 0 to 1 (see `graphq.report.cost`)."""

    layer: str
    op: str
    node: str
    action: str
    spec: str
    pattern: str
    predicted: str
    found: str
    rule: str
    reason: str
    share: float = 0.0

    @property
    def agrees(self) -> bool:
        """Is the kernel that was found the one that was predicted?"""
        if not self.found:
            return True
        if self.action in ("quantize", "fuse") or (self.action == "weight_only" and self.predicted != "float"):
            return self.found == self.predicted
        if self.action == "carry":
            return self.found in SAME_MOVE.get(self.predicted, {self.predicted})
        return not self.found.startswith(INTEGER_PREFIXES)


@dataclass(repr=False)
class Explanation:
    """The rows of a graph, in order. Printed it is a line per op, but for computations of shapes."""

    rows: list[Row]

    def __repr__(self) -> str:
        lines = (
            f"{r.layer or '(model)'} ({r.op}): {r.action}, {r.found or r.predicted}: {r.reason} [{r.rule}]"
            for r in self.rows
            if r.action != "skip"
        )
        return "\n".join(lines)

    def __getitem__(self, layer: str) -> list[Row]:
        """The rows of a module path and of everything inside it."""
        rows = [r for r in self.rows if r.layer == layer or r.layer.startswith(f"{layer}.") or r.node == layer]
        if not rows:
            raise StateError(f"no layer {layer!r}", remedy=did_you_mean(layer, {r.layer for r in self.rows if r.layer}))
        return rows

    @property
    def disagreements(self) -> list[Row]:
        return [r for r in self.rows if not r.agrees]

    @property
    def undecided(self) -> list[Row]:
        return [r for r in self.rows if not r.action or not r.reason]

    def kernels(self) -> dict[str, int]:
        """How many ops each kernel computes, as found where an ONNX file was given, else as predicted."""
        heads = [r for r in self.rows if r.action not in ("fuse", "skip")]
        return dict(Counter(r.found or r.predicted for r in heads).most_common())

    def to_dicts(self) -> list[dict[str, Any]]:
        return [{**asdict(r), "agrees": r.agrees} for r in self.rows]


def explain(gm: fx.GraphModule, onnx_path: str | Path | None = None) -> Explanation:
    """Explain a prepared, calibrated or converted graph; with the exported file also which kernels really run,
    where the target's runtime is on this machine."""
    expect_one(gm, "explain")
    target = gm.meta.get("graphq_target")
    here = onnx_path is not None and (target is None or bool(target.executor))
    found: _Found | FoundInOpenVino | FoundInInductor | None = None
    if onnx_path is not None and here:
        executor = target.executor if target else ""
        if executor == "openvino":
            found = FoundInOpenVino(onnx_path)
        elif executor == "inductor":
            found = FoundInInductor(gm, onnx_path)
        else:
            found = _Found(gm, onnx_path)
    rows = []
    for node in gm.graph.nodes:
        if node.op != "call_function" or is_quantization(node):
            continue
        decision = decision_of(node)
        if decision is None:
            raise StateError("nothing has been decided on this graph", remedy="Call graphq.prepare first.")
        view = LayerView(gm, node)
        rows.append(
            Row(
                layer=view.path,
                op=view.op.removeprefix("aten.").removesuffix(".default"),
                node=node.name,
                action=decision.action,
                spec=_spec(decision),
                pattern=decision.pattern,
                predicted=decision.kernel or ("-" if decision.action == "skip" else "float"),
                found=found.kernel(node, decision) if found else "",
                rule=decision.rule,
                reason=decision.reason,
            )
        )
    parts = shares(n for n in gm.graph.nodes if decision_of(n) is not None and n.op == "call_function")
    by_name = {n.name: part for n, part in parts.items()}
    for row in rows:
        row.share = by_name[row.node]
    return Explanation(rows)


def _spec(decision: Decision) -> str:
    parts = [f"in {next(iter(decision.inputs.values()))}"] if decision.inputs else []
    if decision.weight_spec is not None:
        parts.append(f"w {decision.weight_spec}")
    if decision.output is not None:
        parts.append(f"out {decision.output}")
    return ", ".join(parts)


class _Found:
    """Which node of the optimized model makes the tensor of an op."""

    def __init__(self, gm: fx.GraphModule, path: str | Path) -> None:
        model = load_model(path)
        self.made = {name: node for node in optimized_model(path).graph.node for name in node.output}
        outputs = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
        flat = [n for n in pytree.tree_leaves(outputs.args[0]) if isinstance(n, fx.Node)]
        self.alias = {n.name: o.name for n, o in zip(flat, model.graph.output, strict=False)}

    def kernel(self, node: fx.Node, decision: Decision) -> str:
        if decision.action == "skip":
            return ""
        head_decision = decision_of(decision.head) if decision.head is not None else decision
        assert head_decision is not None
        root = (head_decision.members or [node])[0]
        head = decision.head or node
        integer = decision.action in ("quantize", "fuse", "carry")
        names = [q.name for q in root.users if q.target is QUANTIZE] if integer and head_decision.output else []
        if decision.action == "carry":
            names = [q.name for q in root.users if q.target is QUANTIZE]
        names += [f"{head.name}_matmul", root.name, self.alias.get(root.name, "")]
        names += [self.alias.get(d.name, "") for q in root.users for d in q.users]
        made = next((self.made[n] for n in names if n in self.made), None)
        while made is not None and made.op_type == "Reshape" and decision.kernel == "QGemm":
            made = self.made.get(made.input[0])  # a Gemm of more than two dimensions stands between Reshapes
        while made is not None and made.op_type in ("Mul", "Cast") and decision.kernel == "MatMulInteger":
            made = self.made.get(made.input[0])  # the scales of tokens and channels come behind it
        if made is not None and made.op_type == "Squeeze" and decision.kernel == "DynamicQuantizeLSTM":
            made = self.made.get(made.input[0])  # its results have an axis of directions
        return made.op_type if made is not None else "fused"
