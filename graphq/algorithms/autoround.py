"""AutoRound (Cheng et al., 2023): how all weights of a block are rounded, and their ranges, are learned together, by
the sign of the gradient of what the block's results lose.

    Ŵ = s·c·clamp(round(W / (s·c) + V)),   -0.5 ≤ V ≤ 0.5
    minimize ‖block(W, X) - block(Ŵ, X̂)‖²,   V ← V - η·sign(∂V), c likewise, η falls to zero

s is the scale that the spec's observer finds, and c, one for each scale, stretches its range (the paper's α and β, of
both ends alike). X̂ are the inputs that the blocks rounded before give. Some batches are held out: a block that gains
nothing on them is rounded to the nearest. Blocks are found in the graph: see `blocks`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from graphq.algorithms.base import ALGORITHMS, Run, expect_data
from graphq.algorithms.blocks import Block, cut_into_blocks
from graphq.algorithms.chosen import all_stored, settle, settle_stored
from graphq.algorithms.grid import Grid, grid_of
from graphq.algorithms.layers import Layer, by_input, input_rows, names_of
from graphq.algorithms.results import WeightResult, errors_of, keep_results
from graphq.errors import NOT_FINITE, CalibrationError, ConfigError, GraphqError
from graphq.graph.garbage import give_back
from graphq.graph.optable import family_of
from graphq.graph.passes import finish
from graphq.graph.view import LayerView
from graphq.numerics.affine import expand
from graphq.numerics.formats import Integer
from graphq.numerics.products import add_moments, mirrored
from graphq.observers.tokens import counted
from graphq.passes.placement import shared_magnitudes

NAME = "autoround"
HELD_OUT = 8  # every so many batches one is not learned from
LARGE = 8  # times the elements that a block reads
Wanted = Callable[[int], list[Tensor]]
NARROWEST, WIDEST = 0.5, 1.5  # of c


@ALGORITHMS.register(NAME)
def autoround(
    graphs: Sequence[fx.GraphModule], run: Run, *, iterations: int = 200, batch: int = 4, layers: int = 8
) -> None:
    """iterations: steps of each block; the first is 1 / iterations wide. batch: batches of data that a step looks at.
    layers: most layers of a block that is made of smaller ones."""
    if iterations < 1 or batch < 1 or layers < 1:
        raise ConfigError(f"iterations {iterations}, batch {batch} and layers {layers} are positive", where=NAME)
    walks = [_Walk(gm, run, iterations, batch, layers) for gm in graphs]
    try:
        for walk in walks:
            for block in run.progress(walk.blocks, NAME):
                walk.choose(block)
                give_back()
    except BaseException:
        for walk in walks:
            walk.undo()
        raise
    for walk in walks:
        walk.finish()


class _Walk:
    """One graph, block by block."""

    def __init__(self, gm: fx.GraphModule, run: Run, iterations: int, batch: int, most: int) -> None:
        self.gm, self.iterations, self.batch, self.store = gm, iterations, batch, run.store
        found, self.others = by_input(gm)
        self.sources: dict[fx.Node, fx.Node] = {}  # what each layer's op reads, behind a quantizer that is off
        groups: dict[fx.Node, list[Layer]] = {}
        for source, every in found.items():
            for layer in every:
                reason = refused(layer)
                if reason:
                    self.others[layer.node] = reason
                    continue
                self.sources[layer.node] = layer.node.args[0]  # type: ignore[assignment]
                groups.setdefault(source, []).append(layer)
        if not groups:
            why = "; ".join(sorted(set(self.others.values()))) or "no weight is quantized"
            raise ConfigError(f"there is no weight to learn: {why}", where=NAME, remedy="algorithms: gptq.")
        self.shared = shared_magnitudes(gm)
        self.rounded, self.exact = run.stream(gm), run.stream(gm, original=True)
        self.blocks = cut_into_blocks(self.rounded, groups, most)
        if self.store is not None:
            self.store.plan([layer.parameter_name for b in self.blocks for layer in b.layers], names_of(self.others))
        self.left = [b for b in self.blocks if self.store is None or not all_stored(b.layers, self.store)]
        recurrent = [n for n in gm.graph.nodes if family_of(n.target) == "lstm"]
        if recurrent:
            raise ConfigError("gradients do not pass through an LSTM", where=LayerView(gm, recurrent[0]).where(),
                              remedy="algorithms: gptq.")  # fmt: skip
        self.results: list[WeightResult] = []

    @torch.no_grad()
    def choose(self, block: Block) -> None:
        begun = time.perf_counter()
        for stream in (self.rounded, self.exact) if self.left else ():
            stream.until(block.start)  # also where this block is learned already: one block's weights at a time
        if self.store is not None and block not in self.left:
            for layer in block.layers:
                stored = self.store.get(layer.parameter_name)
                layer.compensates = stored is not None and not stored.result.taken_back
                self.results.append(settle_stored(layer, NAME, self.store))
            return
        self.left.remove(block)
        wanted = self._wanted(block)
        moments = self._moments(block)
        learned = [self._rounding(layer, *moments[layer.node]) for layer in block.layers]
        count = len(self.rounded.frontier)
        held = list(range(0, count, HELD_OUT)) if count > 1 else [0]
        seen = [n for n in range(count) if n not in held] or held
        before = self._lost(block, learned, wanted, held)
        with torch.enable_grad():
            self._learn(block, learned, wanted, seen)
        after = self._lost(block, learned, wanted, held)
        better = after < before
        seconds = (time.perf_counter() - begun) / len(learned)
        for rounding in learned:
            if not better:
                rounding.forget()
            self._settle(rounding, seconds, better)

    def _wanted(self, block: Block) -> Wanted:
        """The results of the float model, by the number of a batch: kept, or computed again where they are far larger
        than what the block reads (logits)."""
        values = self.exact.trial(0, block.stop, keep=[block.start, *block.results])
        if sum(values[n].numel() for n in block.results) > LARGE * max(values[block.start].numel(), 1):
            return lambda number: [self.exact.trial(number, block.stop, keep=block.results)[n] for n in block.results]
        self.exact.until(block.stop)
        kept = [[self.exact.frontier[i][n] for n in block.results] for i in range(len(self.exact.frontier))]
        return kept.__getitem__

    def _rounding(self, layer: Layer, hessian: Tensor, rows: int) -> _Rounding:
        where = layer.view.where()
        try:
            return _Rounding(layer, hessian, rows, self.shared.get(layer.quantizer))
        except GraphqError as e:
            raise CalibrationError(f"{NAME}: {e.what}", where=where, remedy=e.remedy) from e

    def _moments(self, block: Block) -> dict[fx.Node, tuple[Tensor, int]]:
        """For each layer's op the second moments of its inputs [groups, in, in] and over how many rows."""
        alike: dict[object, list[Layer]] = {}
        for layer in block.layers:
            alike.setdefault((self.sources[layer.node], layer.shape()), []).append(layer)
        totals: dict[object, Tensor] = {}
        counts, reached = dict.fromkeys(alike, 0), dict.fromkeys(alike, False)
        for number in range(len(self.rounded.frontier)):
            values = self.rounded.trial(number, block.stop, keep=[self.sources[layer.node] for layer in block.layers])
            for key, layers in alike.items():
                x = values[self.sources[layers[0].node]]
                rows, reached[key] = input_rows(layers[0], x, self.rounded.masks[number]), reached[key] or x.numel() > 0
                if key not in totals:
                    totals[key] = rows.new_zeros(len(rows), *[rows.shape[2]] * 2)
                add_moments(totals[key], rows)
                counts[key] += rows.shape[1]
        whole = {key: mirrored(total) for key, total in totals.items()}
        for key, layers in alike.items():
            if reached[key]:  # else it is an expert that the model has not chosen once
                expect_data(layers[0].view, counts[key], whole[key].diagonal(dim1=1, dim2=2))
        return {layer.node: (whole[key], counts[key]) for key, layers in alike.items() for layer in layers}

    def _learn(self, block: Block, learned: list[_Rounding], wanted: Wanted, seen: list[int]) -> None:
        order = torch.Generator().manual_seed(0)
        for step in range(self.iterations):
            weights = [rounding.weight() for rounding in learned]
            leaves = [w.detach().requires_grad_() for w in weights]
            read = {r.layer.call: leaf for r, leaf in zip(learned, leaves, strict=True)}
            for number in torch.randperm(len(seen), generator=order)[: self.batch].tolist():
                error = self._error(block, read, wanted, seen[number])
                if not torch.isfinite(error):
                    raise CalibrationError(
                        f"what this block computes of batch {seen[number]} is not finite",
                        where=block.layers[0].view.where(),
                        remedy=NOT_FINITE,
                    )
                if error.requires_grad:  # not where what the layers compute becomes an integer
                    error.backward()
            grads = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
            torch.autograd.backward(weights, grads)
            rate = (1 - step / self.iterations) / self.iterations
            for rounding in learned:
                rounding.step(rate)

    def _lost(self, block: Block, learned: list[_Rounding], wanted: Wanted, numbers: list[int]) -> float:
        read = {rounding.layer.call: rounding.weight().detach() for rounding in learned}
        return sum(float(self._error(block, read, wanted, number)) for number in numbers)

    def _error(self, block: Block, read: dict[fx.Node, Tensor], wanted: Wanted, number: int) -> Tensor:
        values = self.rounded.trial(number, block.stop, read, block.results)
        mask, parts = self.rounded.masks[number], []
        for node, target in zip(block.results, wanted(number), strict=True):
            lost = counted((values[node] - target).square(), mask)
            parts.append(lost.sum() / max(1, lost.numel()))  # a batch of which no token counts loses nothing
        return torch.stack(parts).sum()

    def _settle(self, rounding: _Rounding, seconds: float, better: bool) -> None:
        layer, grid = rounding.layer, rounding.on_grid()
        chosen = rounding.matrix().detach()
        errors = errors_of(rounding.original, chosen, grid, rounding.hessian, rounding.rows)
        about = (layer.node.name, layer.view.path, NAME, seconds)
        every = tuple(range(len(rounding.hessian)))
        unseen, back = () if rounding.rows else every, () if better else every
        result = WeightResult(*about, **errors, unseen=unseen, taken_back=back)  # type: ignore[arg-type]
        layer.compensates = better  # the nearest values make nothing good
        settle(layer, chosen, grid, NAME, result, self.store)
        self.results.append(result)

    def undo(self) -> None:
        """Leave the graph as it was."""
        for block in self.blocks:
            for layer in block.layers:
                layer.unsettle()
        finish(self.gm)

    def finish(self) -> None:
        """Say what was done, and what was not."""
        keep_results(self.gm, NAME, self.results, self.others)
        finish(self.gm)


def refused(layer: Layer) -> str | None:
    """Why the layer cannot be learned, if it cannot."""
    if layer.view.family == "experts":
        return "experts are learned from tokens that another router may send elsewhere"
    if not isinstance(layer.spec.number_format, Integer):
        return f"{layer.spec.format} has no next code up and down"
    return None


class _Rounding:
    """V and c of one weight."""

    def __init__(self, layer: Layer, hessian: Tensor, rows: int, overall: Tensor | None) -> None:
        self.layer, self.hessian, self.rows, self.original = layer, hessian, rows, layer.matrix()
        self.grid = grid_of(layer.spec, layer.block, self.original, hessian, overall)
        self.low, self.high = layer.spec.number_format.limits(layer.spec.narrow_range)
        self.zero = self._wide(self.grid.zero)
        self.forget()

    def forget(self) -> None:
        """Round to the nearest."""
        self.up = torch.zeros_like(self.original).requires_grad_()
        self.stretch = torch.ones_like(self.grid.scale).requires_grad_(self.layer.spec.scale == "float")

    def matrix(self) -> Tensor:
        """Ŵ [out, K], with gradients to V and c."""
        scale = self._wide(self.grid.scale * self.stretch)
        steps = self.original / scale + self.up
        steps = steps + (steps.round() - steps).detach()
        return steps.clamp(self.low - self.zero, self.high - self.zero) * scale

    def weight(self) -> Tensor:
        """The same in the weight's own shape."""
        return self.layer.shaped(self.matrix())

    def step(self, rate: float) -> None:
        with torch.no_grad():
            for tensor, low, high in ((self.up, -0.5, 0.5), (self.stretch, NARROWEST, WIDEST)):
                if tensor.grad is not None:
                    tensor.sub_(rate * tensor.grad.sign()).clamp_(low, high)
                    tensor.grad = None

    def on_grid(self) -> Grid:
        self.grid.scale = (self.grid.scale * self.stretch).detach()
        self.stretch = torch.ones_like(self.grid.scale)
        return self.grid

    def _wide(self, param: Tensor) -> Tensor:
        return expand(param, self.original.shape, self.grid.block) if self.grid.block else param.reshape(())
