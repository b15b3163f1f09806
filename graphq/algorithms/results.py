"""What choosing a weight has cost: squared errors of the weight and of its products on the calibration data.

The products are never computed: with H = X·Xᵀ, summed over all inputs X of the layer, ‖E·X‖² is the trace of E·H·Eᵀ.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphq.algorithms.grid import Grid
from graphq.graph.decision import decision_of
from graphq.numerics.products import matmul

RESULTS = "graphq_weights"  # in a graph's meta: a WeightResult for every weight that an algorithm has chosen


@dataclass(frozen=True)
class WeightResult:
    """One weight W that an algorithm has rounded to Ŵ. X: the inputs that it was chosen on.

    output_squared_error: ‖(W - Ŵ)·X‖²; weight_squared_error: ‖W - Ŵ‖². mean_…: by the number of elements. relative_…:
    over ‖W·X‖² and ‖W‖², None where that is zero. nearest: the relative output error of the nearest values on the same
    grid. seconds: of choosing. groups: experts, or groups of channels. unseen: those that no calibration token has
    reached; they are rounded to the nearest. taken_back: those for which what was learned was no better on data held
    out, so that the nearest values are taken.
    """

    node: str
    layer: str
    algorithm: str
    seconds: float
    output_squared_error: float
    mean_output_squared_error: float
    relative_output_squared_error: float | None
    weight_squared_error: float
    mean_weight_squared_error: float
    relative_weight_squared_error: float | None
    nearest: float | None
    groups: int = 1
    unseen: tuple[int, ...] = ()
    taken_back: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.taken_back, bool):  # as it was kept before groups were told apart
            object.__setattr__(self, "taken_back", (0,) if self.taken_back else ())
        for name in ("unseen", "taken_back"):  # JSON knows lists only
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def words(self) -> str:
        """For a decision's reason."""
        if len(self.unseen) == self.groups and self.relative_output_squared_error is None:
            return f"{self.algorithm}: no token of the calibration data reaches it, and it is rounded to the nearest"
        back = "; held-out data say no better than the nearest, which is taken" if self.taken_back else ""
        if 0 < len(self.taken_back) < self.groups:
            back += f" in groups {', '.join(map(str, self.taken_back))} of {self.groups}"
        if self.relative_output_squared_error is None or self.nearest is None:
            return f"{self.algorithm}: its products are zero on all data{back}"
        lost = f"{self.relative_output_squared_error:.2%} of its products' energy lost"
        without = ", ".join(map(str, self.unseen))
        note = f"; experts {without} saw no token and are rounded to the nearest" if without else ""
        return f"{self.algorithm}: {lost}, to the nearest {self.nearest:.2%}{note}{back}"


def weight_results(graph: fx.GraphModule) -> list[WeightResult]:
    """What weight algorithms have made of the weights of a calibrated or converted graph, in their order."""
    return list(graph.meta.get(RESULTS, ()))


def keep_results(gm: fx.GraphModule, name: str, results: list[WeightResult], others: dict[fx.Node, str]) -> None:
    """Keep with the graph what an algorithm has chosen, and say of other quantized ops why it left their weights."""
    for node, why in others.items():
        decision = decision_of(node)
        assert decision is not None
        decision.reason += f"; to the nearest, not {name}: {why}"
    gm.meta.setdefault(RESULTS, []).extend(results)


def errors_of(weight: Tensor, chosen: Tensor, grid: Grid, hessian: Tensor, rows: float) -> dict[str, float | None]:
    """The errors of a WeightResult. weight, chosen: [out, in]; hessian: [groups, in, in], summed over `rows` inputs."""
    squares = _squares(weight - chosen)
    total, norm = _energy(weight, hessian), _squares(weight)
    output, nearest = (_energy(weight - w, hessian) for w in (chosen, grid.rounded(weight)))
    return {
        "output_squared_error": output,
        "mean_output_squared_error": output / max(rows * len(weight), 1),
        "relative_output_squared_error": output / total if total > 0 else None,
        "weight_squared_error": squares,
        "mean_weight_squared_error": squares / weight.numel(),
        "relative_weight_squared_error": squares / norm if norm > 0 else None,
        "nearest": nearest / total if total > 0 else None,
        "groups": len(hessian),
    }


def _squares(x: Tensor) -> float:
    return float(x.double().square().sum())


def _energy(weight: Tensor, hessian: Tensor) -> float:
    parts = zip(weight.chunk(len(hessian)), hessian, strict=True)
    return sum(float((matmul(w, h) * w).sum(dtype=torch.float64)) for w, h in parts)
