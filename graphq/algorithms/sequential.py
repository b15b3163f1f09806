"""Weight algorithms: one layer after the other, each on the inputs that the layers rounded before it give it.

All samples go through the graph together, from one group of layers to the next. Layers that read one tensor (q, k, v;
gate, up) are a group and share its second moments H = X·Xᵀ. Every op runs once: what is behind a layer sees its
rounded weight.

qep (Arai and Ichikawa, 2025): before a layer is rounded its weight takes on what its inputs have lost,

    W ← W + qep · W·(X - X̂)·X̂ᵀ·(X̂·X̂ᵀ + λI)⁻¹,   X: inputs of the float model, X̂: those of the rounded one
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphq.algorithms.base import ALGORITHMS, Run
from graphq.algorithms.grid import Grid
from graphq.algorithms.layers import Layer, by_input, input_rows
from graphq.errors import CalibrationError, ConfigError
from graphq.graph.decision import decision_of
from graphq.graph.passes import finish

RESULTS = "graphq_weights"  # in a graph's meta: a WeightResult for every weight that an algorithm has chosen
WeightFunction = Callable[..., Tensor]


@dataclass(frozen=True)
class WeightResult:
    """What rounding one weight costs: Σ|ΔW·x|² over Σ|W·x|² on the calibration data, and the same to the nearest."""

    node: str
    layer: str
    algorithm: str
    error: float
    error_nearest: float


def weight_algorithm(name: str) -> Callable[[WeightFunction], WeightFunction]:
    """Register a function (weight [out, in], hessian [in, in], grid, *, …) → weight on the grid.

    Its keyword arguments are arguments of the algorithm, together with `qep` and `qep_damping`.
    """

    def register(function: WeightFunction) -> WeightFunction:
        @functools.wraps(function)
        def algorithm(
            graphs: Sequence[fx.GraphModule], run: Run, *, qep: float = 0.0, qep_damping: float = 0.01, **args: Any
        ) -> None:
            if not 0 <= qep <= 1:
                raise ConfigError(f"qep is a share from 0 to 1, not {qep!r}", where=name)
            for gm in graphs:
                _Walk(gm, run, name, functools.partial(function, **args), qep, qep_damping).go()

        own = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        shared = list(inspect.signature(algorithm, follow_wrapped=False).parameters.values())
        kept = [p for p in shared if p.kind is not p.VAR_KEYWORD]
        algorithm.__signature__ = inspect.Signature([*kept, *own])  # type: ignore[attr-defined]
        ALGORITHMS.register(name)(algorithm)
        return function

    return register


class _Walk:
    def __init__(
        self, gm: fx.GraphModule, run: Run, name: str, choose: WeightFunction, qep: float, qep_damping: float
    ) -> None:
        self.gm, self.name, self.choose, self.qep, self.qep_damping = gm, name, choose, qep, qep_damping
        self.groups = by_input(gm)
        if not self.groups:
            raise ConfigError(
                "no linear or convolution has a weight of its own that is quantized",
                where=name,
                remedy="Let a rule quantize some.",
            )
        _explain_others(gm, self.groups, name)
        self.rounded = run.stream(gm)
        self.exact = run.stream(gm, original=True) if qep else None
        self.progress = run.progress
        self.results: list[WeightResult] = []

    def go(self) -> None:
        for source, layers in self.progress(self.groups.items(), self.name):
            inputs = self.rounded.until(source)
            wanted = self.exact.until(source) if self.exact is not None else None
            for layers_of_shape in _alike(layers):
                self._quantize(layers_of_shape, inputs, wanted)
        self.gm.meta.setdefault(RESULTS, []).extend(self.results)
        finish(self.gm)

    def _quantize(self, layers: list[Layer], inputs: list[Tensor], wanted: list[Tensor] | None) -> None:
        """Layers that see the same rows of the same inputs."""
        hessian, cross = _moments(layers[0], inputs, wanted, self.rounded.masks)
        for layer in layers:
            weight = layer.matrix()
            parts = []
            for w, h, c in zip(weight.chunk(len(hessian)), hessian, cross, strict=True):
                parts.append(w if c is None else w + self.qep * _correction(w, h, c, self.qep_damping))
            aimed = torch.cat(parts)
            grid = Grid(layer.spec, layer.block, aimed)
            try:
                chosen = self._choose(aimed, hessian, grid)
            except CalibrationError as e:
                raise CalibrationError(e.what, where=layer.view.where(), remedy=e.remedy) from e
            result = self._result(layer, aimed, hessian, grid, chosen)
            self.results.append(result)
            lost = f"{result.error:.2%} of its products' energy lost, to the nearest {result.error_nearest:.2%}"
            layer.settle(chosen, grid.scale, grid.zero, self.name, f"{self.name}: {lost}")

    def _choose(self, weight: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
        if len(hessian) == 1:
            return self.choose(weight, hessian[0], grid)
        parts = zip(weight.chunk(len(hessian)), hessian, grid.split(len(hessian)), strict=True)
        return torch.cat([self.choose(w, h, g) for w, h, g in parts])

    def _result(self, layer: Layer, weight: Tensor, hessian: Tensor, grid: Grid, chosen: Tensor) -> WeightResult:
        energy = _energy(weight, hessian)
        errors = (_energy(weight - w, hessian) / max(energy, 1e-30) for w in (chosen, grid.rounded(weight)))
        return WeightResult(layer.node.name, layer.view.path, self.name, *errors)


def _explain_others(gm: fx.GraphModule, groups: dict[fx.Node, list[Layer]], name: str) -> None:
    """Say on weights that this algorithm leaves alone why it does."""
    taken = {layer.node for layers in groups.values() for layer in layers}
    for node in gm.graph.nodes:
        decision = decision_of(node)
        if decision is not None and decision.weight_spec is not None and node not in taken:
            decision.reason += f"; to the nearest: {name} takes linears and convolutions with weights of their own"


def _alike(layers: list[Layer]) -> list[list[Layer]]:
    """Layers whose inputs are cut into the same rows: all linears, or convolutions of one shape."""
    found: dict[Any, list[Layer]] = {}
    for layer in layers:
        found.setdefault(layer.shape(), []).append(layer)
    return list(found.values())


def _moments(
    layer: Layer, inputs: list[Tensor], wanted: list[Tensor] | None, masks: list[Tensor | None]
) -> tuple[Tensor, list[Tensor | None]]:
    """(Σ X̂ᵀX̂ [groups, in, in], for each group Σ (X - X̂)ᵀX̂ or None)."""
    total: Tensor | None = None
    cross: Tensor | None = None
    for number, x in enumerate(inputs):
        rows = input_rows(layer, x, masks[number])
        moment = rows.transpose(1, 2) @ rows
        total = moment if total is None else total + moment
        if wanted is not None:
            lost = input_rows(layer, wanted[number], masks[number]) - rows
            moment = lost.transpose(1, 2) @ rows
            cross = moment if cross is None else cross + moment
    if total is None:
        raise CalibrationError("no calibration data reaches this layer", where=layer.view.where())
    return total, list(cross) if cross is not None else [None] * len(total)


def _correction(weight: Tensor, hessian: Tensor, cross: Tensor, damping: float) -> Tensor:
    """weight · cross · (hessian + λI)⁻¹ [out, in]."""
    damped = hessian.double()
    mean = damped.diagonal().mean().clamp(min=1e-12)
    damped = damped + torch.eye(len(damped), dtype=damped.dtype, device=damped.device) * (damping * mean)
    return torch.linalg.solve(damped, (weight.double() @ cross.double()).T).T.float()


def _energy(weight: Tensor, hessian: Tensor) -> float:
    parts = zip(weight.chunk(len(hessian)), hessian, strict=True)
    return sum(float(((w @ h) * w).sum(dtype=torch.float64)) for w, h in parts)
