"""Weight algorithms: one layer after the other, each on the inputs that the layers rounded before it give it.

All samples go through the graph together, from one group of layers to the next. Layers that read one tensor (q, k, v;
gate, up) are a group and share its second moments H = X·Xᵀ. Every op runs once: what is behind a layer sees its
rounded weight.

qep (Arai and Ichikawa, 2025): before a layer is rounded its weight takes on what its inputs have lost,

    W ← W + qep · W·(X - X̂)·X̂ᵀ·(X̂·X̂ᵀ + λI)⁻¹,   X: inputs of the float model, X̂: those of the rounded one

propagate_error: false rounds every layer on the inputs that the float model gives it.
"""

from __future__ import annotations

import functools
import gc
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphq.algorithms.base import ALGORITHMS, Run
from graphq.algorithms.chosen import all_stored, settle, settle_stored
from graphq.algorithms.grid import Grid, grid_of
from graphq.algorithms.layers import Layer, by_input, names_of
from graphq.algorithms.moments import Moments, moments_of
from graphq.algorithms.results import WeightResult, errors_of, keep_results
from graphq.config.selectors import matches
from graphq.config.spec import QuantSpec
from graphq.errors import CalibrationError, ConfigError, GraphqError, did_you_mean
from graphq.graph.garbage import give_back
from graphq.graph.passes import finish
from graphq.numerics.products import linear
from graphq.numerics.scales import TWO_LEVEL
from graphq.passes.placement import shared_magnitudes

MOST = 1 << 24  # elements of the matrices of a layer that are in memory in more copies
TRIAL = QuantSpec(format="int8", granularity="channel")
WeightFunction = Callable[..., Tensor]
FUNCTIONS: dict[str, WeightFunction] = {}


DAMPING = 0.01  # of qep, relative to the mean of the moments' diagonal
ENOUGH = 0.1  # share of qep from which a weight makes good more than the correction of its bias would
TOGETHER = "graphq_together"  # attribute of a function that takes all groups of a layer at once
BY_ROW = "graphq_by_row"  # … whose rows know nothing of each other
JUDGED = "graphq_judged"  # … whose choice may be worse than the nearest values on other data, and is held against them
ASYMMETRIC = "graphq_asymmetric"  # … that wants to know what the inputs have lost
OF_THE_WALK = ("qep", "qep_damping", "qep_exclude", "propagate_error")  # arguments that are not the function's own


def weight_algorithm(
    name: str, *, together: bool = False, by_row: bool = False, asymmetric: bool = False, judged: bool = True
) -> Callable[[WeightFunction], WeightFunction]:
    """Register a function (weight [out, in], hessian [in, in], grid, *, …) → weight on the grid.

    Its keyword arguments are arguments of the algorithm, together with `qep`, `qep_damping`, `qep_exclude` (selectors
    of layers that are rounded as they are) and `propagate_error`. A layer of several groups (of channels, of experts)
    is several such weights; together: the function gets them all at once, weight [groups, out, in], hessian
    [groups, in, in]. by_row: each row of a weight is chosen as if it were alone, so that layers of one tensor may come
    as one weight. judged: where a layer sees few rows, some are held out, and the nearest values taken where they do
    better on these. asymmetric: the function has an argument `cross`, (X - X̂)·X̂ᵀ [in, in] or None, in place of those of
    qep and propagation.
    """

    def register(function: WeightFunction) -> WeightFunction:
        setattr(function, TOGETHER, together)
        setattr(function, BY_ROW, by_row)
        setattr(function, JUDGED, judged and not asymmetric)
        setattr(function, ASYMMETRIC, asymmetric)

        def algorithm(
            graphs: Sequence[fx.GraphModule], run: Run, *, qep: float = 0.0, qep_damping: float = DAMPING,
            qep_exclude: str | Sequence[str] = (), propagate_error: bool = True, **args: Any,
        ) -> None:  # fmt: skip
            _expect_qep(name, qep, qep_damping, qep_exclude)
            if not propagate_error and qep:
                raise ConfigError(
                    "without propagate_error inputs have lost nothing that could be made good",
                    where=name,
                    remedy="Leave one of them out.",
                )
            choose = functools.partial(function, **args)
            one = torch.eye(4)
            trial = (one[None], one[None]) if together else (one, one)
            choose(*trial, Grid(TRIAL, (1, -1), one))  # refuses wrong arguments before anything is changed
            exclude = (qep_exclude,) if isinstance(qep_exclude, str) else tuple(qep_exclude)
            correct = _Correct(qep, qep_damping, exclude)
            walks = [_Walk(gm, run, name, choose, correct, propagate_error) for gm in graphs]
            try:
                for walk in walks:
                    walk.go()
            except BaseException:
                for walk in walks:
                    walk.undo()
                raise
            for walk in walks:
                walk.finish()

        every = inspect.signature(function).parameters.values()
        own = [p for p in every if p.kind is p.KEYWORD_ONLY and p.name != "cross"]
        shared = [p for p in inspect.signature(algorithm).parameters.values() if p.kind is not p.VAR_KEYWORD]
        shared = [p for p in shared if not (asymmetric and p.name in OF_THE_WALK)]
        algorithm.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
        algorithm.__doc__ = function.__doc__
        ALGORITHMS.register(name)(algorithm)
        FUNCTIONS[name] = function
        return function

    return register


def _expect_qep(name: str, qep: float, damping: float, exclude: str | Sequence[str]) -> None:
    if not isinstance(qep, (int, float)) or not 0 <= qep <= 1 or damping <= 0:
        raise ConfigError(f"qep is from 0 to 1, not {qep!r}, its damping positive: {damping!r}", where=name)
    if not qep and (exclude or damping != DAMPING):
        what = "qep_exclude" if exclude else "qep_damping"
        raise ConfigError(f"{what} is for qep", where=name, remedy="Say qep: 0.5, or leave it out.")


@dataclass(frozen=True)
class _Correct:
    """What qep is asked to do. exclude: selectors of layers that it leaves alone."""

    share: float
    damping: float
    exclude: tuple[str, ...]

    def wants(self, layer: Layer) -> bool:
        return self.share > 0 and not any(matches(selector, layer.view) for selector in self.exclude)


class _Walk:
    """One graph, layer by layer."""

    def __init__(
        self, gm: fx.GraphModule, run: Run, name: str, choose: WeightFunction, correct: _Correct, propagate: bool
    ) -> None:
        self.gm, self.name, self.choose, self.correct = gm, name, choose, correct
        self.groups, self.others = by_input(gm)
        if not self.groups:
            reasons = "; ".join(sorted(set(self.others.values()))) or "no weight is quantized"
            raise ConfigError(
                f"there is no weight to choose: {reasons}", where=name, remedy="Let a rule quantize some."
            )
        every = [layer for layers in self.groups.values() for layer in layers]
        for selector in correct.exclude:
            if not any(matches(selector, layer.view) for layer in every):
                raise ConfigError(f"qep_exclude: {selector!r} selects no layer whose weight is chosen", where=name,
                                  remedy=did_you_mean(selector, {layer.view.path for layer in every}))  # fmt: skip
        for layer in every:
            layer.compensates = _wants(choose, ASYMMETRIC) or (correct.wants(layer) and correct.share >= ENOUGH)
        self.shared = shared_magnitudes(gm)
        self.rounded = run.stream(gm, original=not propagate)
        self.exact = run.stream(gm, original=True) if correct.share or _wants(choose, ASYMMETRIC) else None
        self.progress, self.store = run.progress, run.store
        self.results: list[WeightResult] = []

    def go(self) -> None:
        if self.store is not None:
            names = [layer.parameter_name for layers in self.groups.values() for layer in layers]
            self.store.plan(names, names_of(self.others))
        gc.collect()  # what tracing has left
        give_back()
        left = {source for source, every in self.groups.items() if not self._stored(every)}
        for source, every in self.progress(self.groups.items(), self.name):
            # also where this group is chosen already: one group's weights at a time
            inputs = self.rounded.until(source) if left else []
            wanted = self.exact.until(source) if left and self.exact is not None else None
            left.discard(source)
            for alike in alike_in_rows(every):
                self._choose(alike, inputs, wanted)
            del inputs, wanted  # before the next are computed
            give_back()

    def undo(self) -> None:
        """Leave the graph as it was."""
        for layers in self.groups.values():
            for layer in layers:
                layer.unsettle()
        finish(self.gm)

    def finish(self) -> None:
        """Say what was done, and what was not."""
        keep_results(self.gm, self.name, self.results, self.others)
        finish(self.gm)

    def _choose(self, alike: list[Layer], inputs: list[Tensor], wanted: list[Tensor] | None) -> None:
        parts = ([layer for layer in alike if self.correct.wants(layer) is corrected] for corrected in (True, False))
        stacks = [s for p in parts for s in (stacks_of(p) if _wants(self.choose, BY_ROW) else [[layer] for layer in p])]
        moments: Moments | None = None
        for layers in stacks:
            if self.store is not None and self._stored(layers):
                self.results += [settle_stored(layer, self.name, self.store) for layer in layers]
                continue
            moments = moments or moments_of(
                alike[0], inputs, wanted, self.rounded, hold_out=_wants(self.choose, JUDGED)
            )
            self._quantize(layers, moments)

    def _stored(self, layers: list[Layer]) -> bool:
        return self.store is not None and all_stored(layers, self.store)

    def _quantize(self, layers: list[Layer], moments: Moments) -> None:
        weight, parts = _joined([layer.matrix() for layer in layers]), []
        share, damping = self.correct.share, self.correct.damping
        for w, h, c in zip(weight.chunk(len(moments.hessian)), moments.hessian, moments.cross, strict=True):
            if c is not None and self.correct.wants(layers[0]):
                w = w + share * _correction(w, h, c, damping)
            parts.append(w)
        shared = self.shared.get(layers[0].quantizer)
        found = round_weights(layers, _joined(parts), moments, self.name, self.choose, shared)
        for layer, (chosen, grid, result) in zip(layers, found, strict=True):
            settle(layer, chosen, grid, self.name, result, self.store)
            self.results.append(result)


def round_weights(
    layers: list[Layer], weight: Tensor, moments: Moments, name: str, choose: WeightFunction, overall: Tensor | None
) -> list[tuple[Tensor, Grid, WeightResult]]:
    """For each layer of a stack (the weight [out, in] that an algorithm chooses, its grid, what that costs). Nothing is
    changed.

    weight: of all, one below the other. overall: see `Grid`. Raises CalibrationError, with the layers' names, where it
    cannot be chosen.
    """
    start, hessian = time.perf_counter(), moments.hessian
    where, spec, block = ", ".join(layer.view.where() for layer in layers), layers[0].spec, layers[0].block
    try:
        grid = grid_of(spec, block, weight, hessian, overall)
        scale = grid.scale.clone()
        chosen = _by_group(choose, weight, moments, grid)
        if chosen.shape != weight.shape:
            raise ConfigError(f"it gave a weight {list(chosen.shape)} for one of {list(weight.shape)}")
    except (GraphqError, torch.linalg.LinAlgError) as e:
        what, remedy = (e.what, e.remedy) if isinstance(e, GraphqError) else (str(e), "More damping.")
        raise CalibrationError(f"{name}: {what}", where=where, remedy=remedy) from e
    seconds, found = time.perf_counter() - start, []
    rows = [len(weight)] if len(layers) == 1 else [layer.shape_of_weight[0] for layer in layers]
    for layer, w, c, g in zip(layers, weight.split(rows), chosen.split(rows), grid.split(rows), strict=True):
        judged = _wants(choose, JUDGED) and torch.equal(grid.scale, scale)  # else refitted: see gptq
        c, back = _judged(w, c, g, moments.held) if judged else (c, ())
        errors = errors_of(w, c, g, hessian, moments.rows)
        about = (layer.node.name, layer.view.path, name, seconds * len(w) / len(weight))
        result = WeightResult(*about, **errors, unseen=moments.unseen, taken_back=back)  # type: ignore[arg-type]
        found.append((c, g, result))
    return found


def _judged(
    weight: Tensor, chosen: Tensor, grid: Grid, held: Sequence[Tensor | None]
) -> tuple[Tensor, tuple[int, ...]]:
    """(the chosen weight, with the nearest values in groups where it loses more than they on rows held out; these)."""
    if all(rows is None for rows in held):
        return chosen, ()
    parts, nearest, back = list(chosen.chunk(len(held))), grid.rounded(weight).chunk(len(held)), []
    for i, (w, rows) in enumerate(zip(weight.chunk(len(held)), held, strict=True)):
        if rows is not None:
            learned, plain = (linear(rows, w - other).square().sum() for other in (parts[i], nearest[i]))
            if learned > plain:
                parts[i] = nearest[i]
                back.append(i)
    return (torch.cat(parts) if back else chosen), tuple(back)


def _by_group(choose: WeightFunction, weight: Tensor, moments: Moments, grid: Grid) -> Tensor:
    hessian = moments.hessian
    if _wants(choose, TOGETHER):
        count = _calls(len(hessian), hessian[0].numel())
        some = zip(weight.chunk(count), hessian.chunk(count), grid.split(_equal(weight, count)), strict=True)
        return torch.cat([choose(w.unflatten(0, (len(h), -1)), h, g).flatten(0, 1) for w, h, g in some])
    asymmetric, chosen = _wants(choose, ASYMMETRIC), []
    grids = [grid] if len(hessian) == 1 else grid.split(_equal(weight, len(hessian)))
    parts = zip(weight.chunk(len(hessian)), hessian, grids, moments.cross, strict=True)
    for number, (w, h, g, c) in enumerate(parts):
        if number in moments.unseen:
            chosen.append(g.rounded(w))
        else:
            chosen.append(choose(w, h, g, cross=c) if asymmetric else choose(w, h, g))
    return torch.cat(chosen)


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _equal(weight: Tensor, parts: int) -> list[int]:
    return [len(weight) // parts] * parts


def _calls(groups: int, size: int) -> int:
    """Into how many equal parts groups go whose matrices, of this size, are looked at together."""
    return next(n for n in range(1, groups + 1) if groups % n == 0 and (n == groups or groups // n * size <= MOST))


def _wants(choose: WeightFunction, attribute: str) -> bool:
    return bool(getattr(getattr(choose, "func", choose), attribute, False))


def stacks_of(alike: list[Layer]) -> list[list[Layer]]:
    """Layers of the same inputs in stacks that an algorithm may take for one weight: their rows have scales of their
    own, in one format (q, k, v; gate, up)."""
    found: dict[Any, list[list[Layer]]] = {}
    for layer in alike:
        rows_alone = bool(layer.block) and layer.block[0] == 1 and layer.spec.scale not in TWO_LEVEL
        same = layer.view.family == "linear" and rows_alone
        stacks = found.setdefault((layer.spec.model_dump_json(), layer.block) if same else layer.node, [[]])
        if sum(other.shape_of_weight.numel() for other in [*stacks[-1], layer]) > MOST:
            stacks.append([])
        stacks[-1].append(layer)
    return [stack for stacks in found.values() for stack in stacks if stack]


def alike_in_rows(layers: list[Layer]) -> list[list[Layer]]:
    """Layers whose inputs are cut into the same rows: all linears, or convolutions of one shape."""
    found: dict[Any, list[Layer]] = {}
    for layer in layers:
        found.setdefault(layer.shape(), []).append(layer)
    return list(found.values())


def _correction(weight: Tensor, hessian: Tensor, cross: Tensor, damping: float) -> Tensor:
    """weight · cross · (hessian + λI)⁻¹ [out, in]."""
    damped = hessian.double()
    mean = damped.diagonal().mean().clamp(min=1e-12)
    damped = damped + torch.eye(len(damped), dtype=damped.dtype, device=damped.device) * (damping * mean)
    return torch.linalg.solve(damped, (weight.double() @ cross.double()).T).T.float()
