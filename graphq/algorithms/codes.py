"""The codes of a calibrated graph's weights, their scales, and what choosing them has cost: for files of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphq.algorithms.results import WeightResult, weight_results
from graphq.algorithms.store import bare_name
from graphq.config.spec import QuantSpec
from graphq.errors import StateError
from graphq.graph.decision import decision_of
from graphq.graph.several import expect_one
from graphq.graph.view import LayerView, parameter
from graphq.numerics.affine import dequantize, quantize
from graphq.passes.placement import quantizer_at
from graphq.quantizer import TensorQuantizer


@dataclass(frozen=True)
class QuantizedWeight:
    """codes: in the shape that the layer's op reads (a linear's is [out, in]) and the storage of the spec's format.
    scale, zero_point: one for each block of it. result: what an algorithm says of it; None where none has chosen it."""

    parameter: str
    layer: str
    spec: QuantSpec
    block: tuple[int, ...]
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    result: WeightResult | None

    def read(self) -> Tensor:
        """Dequantized, float32."""
        return dequantize(self.codes, self.scale, self.zero_point, self.block, self.spec.number_format)


def quantized_weights(calibrated: fx.GraphModule) -> Iterator[QuantizedWeight]:
    """The quantized weights of a calibrated graph, one after the other in its order; one that several ops read comes
    once. Raises StateError for graphs of another stage, and for a weight that no codes stand for."""
    expect_one(calibrated, "quantized_weights")
    if getattr(calibrated, "meta", {}).get("graphq_stage") != "calibrated":
        raise StateError("weights have codes once the graph is calibrated", remedy="Call graphq.calibrate first.")
    return _each(calibrated)


@torch.no_grad()
def _each(calibrated: fx.GraphModule) -> Iterator[QuantizedWeight]:
    results, seen = {r.node: r for r in weight_results(calibrated)}, set()
    for node in calibrated.graph.nodes:
        decision = decision_of(node)
        if decision is None or decision.weight is None or decision.weight_spec is None:
            continue
        for read in (decision.weight, *decision.more_weights):
            call = next((user for user in read.users if user.op == "call_module"), None)
            if call is None or call in seen:
                continue
            seen.add(call)
            yield _weight(LayerView(calibrated, node), read, call, results.get(node.name))


def _weight(view: LayerView, read: fx.Node, call: fx.Node, result: WeightResult | None) -> QuantizedWeight:
    weight, quantizer = parameter(view.gm, read), quantizer_at(view.gm, call)
    assert weight is not None
    scale, zero = quantizer.qparams
    return QuantizedWeight(
        bare_name(str(read.target)), view.path, quantizer.spec, quantizer.block,
        codes_of(weight, quantizer), scale, zero.expand_as(scale), result,
    )  # fmt: skip


def codes_of(weight: Tensor, quantizer: TensorQuantizer) -> Tensor:
    """Raises StateError for a weight that is quantized twice, or anew whenever it is read."""
    if quantizer.then is not None or quantizer.spec.rounding == "stochastic":
        raise StateError(
            f"a weight with {quantizer.spec} has no codes that stand for it",
            where=quantizer.label,
            remedy="Take the weights dequantized: graphq.apply_weights without packed.",
        )
    scale, zero = quantizer.qparams
    fmt = quantizer.spec.number_format
    return quantize(weight.detach(), scale, zero, quantizer.block, fmt, **quantizer.rounding)
