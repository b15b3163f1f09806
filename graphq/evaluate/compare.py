"""compare: how far the quantized graph is from the float model, at the output and at every op."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphq.calibration.batches import batches_of, check_batch
from graphq.errors import CalibrationError
from graphq.evaluate.verify import flat_inputs, flat_outputs
from graphq.graph.capture import capture, example_of
from graphq.graph.decision import decision_of
from graphq.graph.view import LayerView
from graphq.numerics.affine import sqnr
from graphq.passes.canonical import canonical_pipeline


@dataclass
class OpError:
    """SQNR (dB) of one op's result, accumulated over all the data."""

    layer: str
    op: str
    node: str
    sqnr: float


@dataclass
class Comparison:
    """sqnr (dB), cosine and top-1 agreement over the last axis of the first output; ops, the worst first."""

    sqnr: float
    cosine: float
    agreement: float
    ops: list[OpError] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"sqnr_db": self.sqnr, "cosine": self.cosine, "agreement": self.agreement,
                "ops": [vars(o) for o in self.ops]}  # fmt: skip


def output_metrics(reference: Tensor, approximation: Tensor) -> Comparison:
    """Compare two outputs [..., features]."""
    a, b = reference.double().flatten(0, -2), approximation.double().flatten(0, -2)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).mean().item()
    agreement = (a.argmax(-1) == b.argmax(-1)).double().mean().item()
    return Comparison(sqnr(reference, approximation), cosine, agreement)


def compare(model: nn.Module, quantized: fx.GraphModule, data: Any, *, per_op: bool = True) -> Comparison:
    """Compare a float model with its calibrated or converted graph on some batches.

    per_op traces the float model again, to see the same op in both.
    """
    reference = _float_graph(model, quantized) if per_op else None
    outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
    errors: dict[str, list[float]] = {}
    for number, (args, kwargs) in enumerate(batches_of(data)):
        check_batch(quantized, args, kwargs, number)
        with torch.no_grad():
            if reference is not None:
                _compare_ops(reference, quantized, args, kwargs, errors)
            training = model.training
            model.eval()
            outputs[0].append(flat_outputs(model(*args, **kwargs))[0])
            model.train(training)
            outputs[1].append(flat_outputs(quantized(*args, **kwargs))[0])
    if not outputs[0]:
        raise CalibrationError("there is no data to compare on", remedy="Give an iterable of batches.")
    flat = [torch.cat([o.reshape(-1, o.shape[-1]) for o in side]) for side in outputs]
    result = output_metrics(*flat)
    by_name = {n.name: n for n in quantized.graph.nodes}
    for name, (signal, noise) in errors.items():
        view = LayerView(quantized, by_name[name])
        value = float("inf") if noise == 0 else float(10 * torch.log10(torch.tensor(signal / noise)))
        result.ops.append(OpError(view.path, view.op, name, value))
    result.ops.sort(key=lambda o: o.sqnr)
    return result


def _float_graph(model: nn.Module, quantized: fx.GraphModule) -> fx.GraphModule:
    example = example_of(quantized)
    gm = capture(model, example.args, example.kwargs, example.dynamic_shapes)
    canonical_pipeline()(gm)
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


def _compare_ops(
    reference: fx.GraphModule,
    quantized: fx.GraphModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    errors: dict[str, list[float]],
) -> None:
    names = {n.name for n in quantized.graph.nodes if (d := decision_of(n)) is not None and d.action != "skip"}
    names -= {n.name for n in quantized.graph.nodes if n.op == "call_module" or "graphq" in str(n.target)}
    sides = []
    for gm in (reference, quantized):
        watch = _Watch(gm, names)
        watch.run(*flat_inputs(gm, args, kwargs))
        sides.append(watch.seen)
    for name in sides[0].keys() & sides[1].keys():
        a, b = sides[0][name].double(), sides[1][name].double()
        finite = a.isfinite() & b.isfinite()
        entry = errors.setdefault(name, [0.0, 0.0])
        entry[0] += a[finite].square().sum().item()
        entry[1] += (a[finite] - b[finite]).square().sum().item()
