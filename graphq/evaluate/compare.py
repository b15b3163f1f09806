"""compare: how far the quantized graph is from the float model, at the output and at every op."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graphq.algorithms.base import RESCALED
from graphq.calibration.batches import batches_of, check_batch
from graphq.errors import CalibrationError
from graphq.evaluate.verify import db, flat_outputs
from graphq.graph.capture import capture, example_of, flat_inputs
from graphq.graph.decision import decision_of
from graphq.graph.devices import device_of
from graphq.graph.fork import fork
from graphq.graph.several import expect_one
from graphq.graph.view import LayerView


@dataclass
class OpError:
    """SQNR (dB) of one op's result, accumulated over all the data."""

    layer: str
    op: str
    node: str
    sqnr: float


@dataclass(repr=False)
class Comparison:
    """How far two models' outputs are apart: SQNR (dB) of the worst float output; mean cosine and top-1 agreement of
    the first that has features (images [n, classes, h, w] have them along axis 1, everything else along the last).
    ops: every op, the worst first."""

    sqnr: float
    cosine: float
    agreement: float
    ops: list[OpError] = field(default_factory=list)

    def __repr__(self) -> str:
        head = f"output: SQNR {db(self.sqnr)}, cosine {self.cosine:.5f}, agreement {self.agreement:.3f}"
        return "\n".join([head, *(f"{o.layer or '(model)'} ({o.op}): {db(o.sqnr)}" for o in self.ops)])

    def to_dict(self) -> dict[str, Any]:
        return {"sqnr_db": self.sqnr, "cosine": self.cosine, "agreement": self.agreement,
                "ops": [vars(o) for o in self.ops]}  # fmt: skip


class OutputMetrics:
    """Accumulates a Comparison over batches, which may differ in every size."""

    def __init__(self) -> None:
        self._power: dict[int, list[float]] = {}  # output → [signal, noise]
        self._cosine = self._agreement = 0.0
        self._rows = 0

    def add(self, reference: Sequence[Tensor], approximation: Sequence[Tensor]) -> None:
        """The outputs of one batch."""
        pairs = [
            (n, a, b) for n, (a, b) in enumerate(zip(reference, approximation, strict=True)) if a.is_floating_point()
        ]
        for number, a, b in pairs:
            entry = self._power.setdefault(number, [0.0, 0.0])
            finite = a.isfinite() & b.isfinite()
            x, y = a[finite].double(), b[finite].double()
            entry[0] += x.square().sum().item()
            entry[1] += (x - y).square().sum().item()
        features = next(((a, b) for _, a, b in pairs if a.ndim > 1), None)
        if features is not None:
            a, b = (t.double().movedim(1 if t.ndim == 4 else -1, -1).flatten(0, -2) for t in features)
            self._cosine += torch.nn.functional.cosine_similarity(a, b, dim=-1).sum().item()
            self._agreement += (a.argmax(-1) == b.argmax(-1)).sum().item()
            self._rows += len(a)

    def result(self) -> Comparison:
        """Raises CalibrationError if there was nothing to compare."""
        if not self._power:
            raise CalibrationError(
                "there are no float outputs to compare", remedy="Give an iterable of batches, and a model with some."
            )
        worst = min(decibels(signal, noise) for signal, noise in self._power.values())
        rows = self._rows or math.nan
        return Comparison(worst, self._cosine / rows, self._agreement / rows)


def decibels(signal: float, noise: float) -> float:
    """Ratio of powers in dB; inf without noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def output_metrics(reference: Tensor, approximation: Tensor) -> Comparison:
    """Compare two outputs."""
    metrics = OutputMetrics()
    metrics.add([reference], [approximation])
    return metrics.result()


def compare(model: Any, quantized: fx.GraphModule, data: Any, *, per_op: bool = True) -> Comparison:
    """Compare a float model (module, ExportedProgram or captured graph) with its calibrated or converted graph.

    The model is traced again, and its graph is the reference: eager modules may take other paths than their graphs.
    per_op: also the SQNR of every op. Of one whose rows are chosen by values (an expert's) only batches count in which
    both sides have chosen as many, and ops whose channels an algorithm has scaled are left out.
    """
    expect_one(quantized, "compare")
    reference = _float_graph(model, quantized)
    names = _names(quantized) if per_op else set()
    metrics, errors = OutputMetrics(), dict[str, list[float]]()
    for number, (args, kwargs) in enumerate(batches_of(data, device_of(quantized))):
        check_batch(quantized, args, kwargs, number)
        with torch.no_grad():
            sides = [_Watch(gm, names) for gm in (reference, quantized)]
            results = [flat_outputs(w.run(*flat_inputs(quantized, args, kwargs))) for w in sides]
            metrics.add(*results)
            _add_errors(errors, sides[0].seen, sides[1].seen)
    result = metrics.result()
    by_name = {n.name: n for n in quantized.graph.nodes}
    for name, (signal, noise) in errors.items():
        view = LayerView(quantized, by_name[name])
        result.ops.append(OpError(view.path, view.op, name, decibels(signal, noise)))
    result.ops.sort(key=lambda o: o.sqnr)
    return result


def _float_graph(model: Any, quantized: fx.GraphModule) -> fx.GraphModule:
    example = example_of(quantized)
    gm = fork(capture(model, example.args, example.kwargs, example.dynamic_shapes))
    quantized.meta["graphq_canonical"](gm)
    return gm


class _Watch(fx.Interpreter):
    """Keeps the float results of the ops that have decisions."""

    def __init__(self, gm: fx.GraphModule, names: set[str]) -> None:
        super().__init__(gm)
        self.names = names
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names and isinstance(value, Tensor) and value.is_floating_point():
            self.seen[n.name] = value
        return value


def _names(quantized: fx.GraphModule) -> set[str]:
    """The ops of the model: those with decisions, without quantizers."""
    names = {n.name for n in quantized.graph.nodes if (d := decision_of(n)) is not None and d.action != "skip"}
    names -= {n.name for n in quantized.graph.nodes if n.op == "call_module" or "graphq" in str(n.target)}
    return names - set(quantized.meta.get(RESCALED, ()))


def _add_errors(errors: dict[str, list[float]], reference: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name in reference.keys() & other.keys():
        a, b = reference[name].double(), other[name].double()
        if a.shape != b.shape:
            continue  # rows that values choose: another expert may have got them
        finite = a.isfinite() & b.isfinite()
        entry = errors.setdefault(name, [0.0, 0.0])
        entry[0] += a[finite].square().sum().item()
        entry[1] += (a[finite] - b[finite]).square().sum().item()
