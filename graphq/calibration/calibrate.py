"""Calibration of one prepared graph, or of several made from one model for several targets, in one run of the data."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, fx, nn

from graphq.algorithms import ALGORITHMS
from graphq.algorithms.autoround import NAME as AUTOROUND
from graphq.algorithms.autoround import refused
from graphq.algorithms.equalization import NAME as EQUALIZATION
from graphq.algorithms.layers import by_input
from graphq.algorithms.scaling import SEARCHED
from graphq.algorithms.sequential import FUNCTIONS
from graphq.algorithms.store import WeightStore
from graphq.calibration.batches import batches_of
from graphq.calibration.runner import progress_of, run_calibration
from graphq.calibration.stream import Stream
from graphq.calibration.watch import watching
from graphq.errors import ConfigError, StateError
from graphq.graph.on_disk import digest_of, on_disk
from graphq.graph.view import held, parameter
from graphq.observers.tokens import mask_watchers
from graphq.passes.placement import (
    correct_bias,
    fit_bias,
    give_importance,
    guard_saturation,
    importance_watchers,
    maxima_watchers,
    mean_products,
    mean_watchers,
    round_states,
    shared_magnitudes,
)
from graphq.quantizer import TensorQuantizer, quantizers

T = TypeVar("T")
MODEL = "graphq_model"  # in a graph's meta: what it was before the first algorithm
BEFORE = (*SEARCHED, EQUALIZATION)  # algorithms that want weights which none has chosen
DONE = "graphq_algorithms_done"  # in a graph's meta: names of the algorithms that have run


def calibrate_graphs(
    graphs: Sequence[fx.GraphModule],
    data: Any,
    *,
    progress: bool,
    store: str | Path | None = None,
    frontier: Literal["memory", "disk"] = "memory",
) -> None:
    """Find all scales, and what follows from them. Only the first graph is run: while observers watch, all of them
    compute the float model, and a tensor has the same name in each; graphs in which an algorithm has rounded weights do
    not, and are observed one by one."""
    _expect_order([a.name for a in graphs[0].meta["graphq_config"].algorithms])
    _expect_readable(graphs)
    if frontier not in ("memory", "disk") or (frontier == "disk" and store is None):
        raise ConfigError(
            f"a frontier {frontier!r}",
            where="calibrate",
            remedy="'memory', or 'disk' together with a store, where it lies.",
        )
    if store is not None or (graphs[0].meta["graphq_config"].algorithms and hasattr(data, "__next__")):
        data = _listed(data)
    run = _Run(graphs[0], data, progress, None if store is None else store_for(graphs, data, store), frontier)
    try:
        _run_algorithms(graphs, run)
    finally:
        run.close()
    apart = any(q.settled for gm in graphs for q in quantizers(gm).values())
    for together in [[gm] for gm in graphs] if apart else [graphs]:
        _observe(together, data, progress=progress)


def _observe(graphs: Sequence[fx.GraphModule], data: Any, *, progress: bool) -> None:
    statistics = [_Statistics(gm) for gm in graphs]
    first, *others = statistics
    try:
        for s in statistics:
            s.observe()
        every = [q for s in statistics for q in s.quantizers.values()]
        together = not any(q.spec.observer == "moving_average" for q in every)
        named = {n.name: n for n in first.gm.graph.nodes}
        seen = [(named[name], w) for s in statistics for name, w in s.watchers()]
        seen += [(named[name], q) for s in others for name, q in s.activations()]
        watched = seen or any(q.observer is not None for _, q in first.activations())
        with watching(first.gm, seen):
            run_calibration(first.gm, data, progress=progress, together=together, only_check=not watched)
        for s in statistics:
            s.freeze()
    except BaseException:
        for s in statistics:
            s.forget()
        raise
    for s in statistics:
        s.fit()


def _listed(data: Any) -> Any:
    """Data that are the same batches every time: an iterator ends, and a loader may shuffle."""
    return list(data) if isinstance(data, Iterable) and not isinstance(data, (Tensor, Mapping)) else data


def _expect_order(names: list[str]) -> None:
    """Raises ConfigError, before any work, where scales would be sought for weights that are chosen already."""
    chosen = [i for i, name in enumerate(names) if name in (*FUNCTIONS, AUTOROUND)]
    late = [name for name in names[chosen[0] :] if name in BEFORE] if chosen else []
    whole = [i for i in chosen if names[i] in FUNCTIONS]
    again = [names[i] for i in chosen if whole and i > whole[0]]
    if again:
        raise ConfigError(
            f"{names[whole[0]]} chooses all weights, and leaves none for {again[0]}",
            where="algorithms",
            remedy="Name one of them.",
        )
    if late:
        raise ConfigError(
            f"{late[0]} comes behind {names[chosen[0]]}, which has chosen the weights by then",
            where="algorithms",
            remedy=f"Put {late[0]} first.",
        )


def _expect_readable(graphs: Sequence[fx.GraphModule]) -> None:
    """Raises StateError, before any work, for what a model on disk cannot be calibrated for."""
    for gm in graphs:
        if not any(on_disk(t) for t in gm.parameters()):
            continue
        observed = [q.label for q in quantizers(gm).values() if not q.constant and q.spec.dynamic is not True]
        names = {a.name for a in gm.meta["graphq_config"].algorithms}
        walked, learned = bool(names & FUNCTIONS.keys()), AUTOROUND in names
        layers = [layer for every in by_input(gm)[0].values() for layer in every] if walked or learned else []
        chosen = {id(layer.quantizer) for layer in layers if walked or not refused(layer)}
        every = quantizers(gm).values()
        left = [q for q in every if not q.settled and id(q) not in chosen]
        weighted = [q.label for q in left if q.spec.observer == "imatrix_mse"]
        if weighted:
            raise StateError(
                "imatrix_mse looks at inputs while the whole model runs, and its weights are on disk",
                where=weighted[0],
                remedy="Choose the observer mse_grid for weights that no algorithm chooses.",
            )
        if observed or gm.meta["graphq_config"].bias_correction:
            raise StateError(
                "activations are observed while the whole model runs, and its weights are on disk",
                where=(observed or ["bias correction"])[0],
                remedy="Quantize weights alone, or find the scales of inputs at run time (dynamic: true).",
            )


def store_for(graphs: Sequence[fx.GraphModule], data: Any, folder: str | Path) -> WeightStore:
    """The folder for what these algorithms choose for this model on these data.

    Raises ConfigError for algorithms that choose no weights layer by layer or block by block, StateError for several
    targets or a folder of another run.
    """
    config = graphs[0].meta["graphq_config"]
    names = [a.name for a in config.algorithms]
    choosing = {AUTOROUND, *FUNCTIONS}
    if not set(names) & choosing or not set(names) <= choosing | set(SEARCHED):
        raise ConfigError(
            "a store is for weights that are chosen layer by layer, or block by block",
            where=" and ".join(names) or "no algorithm",
            remedy=f"algorithms: one of {', '.join(sorted(choosing))}, after {' or '.join(SEARCHED)} if you like.",
        )
    if len(graphs) > 1:
        raise StateError("a store is for one target", where=str(folder), remedy="Calibrate the graphs one by one.")
    seen = hashlib.sha256()
    for value in torch.utils._pytree.tree_leaves(list(batches_of(data))):
        if not isinstance(value, Tensor):
            seen.update(repr(value).encode())
            continue
        tensor = value.detach().cpu().contiguous()
        seen.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        seen.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    model = graphs[0].meta.setdefault(MODEL, _model(graphs[0]))
    return WeightStore(folder, {"config": config.model_dump(mode="json"), "graph": model, "data": seen.hexdigest()})


def _model(gm: fx.GraphModule) -> list[str]:
    """Ops, and what they read that is not quantized; each quantized weight is looked at when its turn has come."""
    ops = [f"{n.op} {n.target} {n.name}" for n in gm.graph.nodes]
    reads = [n for n in gm.graph.find_nodes(op="get_attr") if not any(u.op == "call_module" for u in n.users)]
    return ops + [digest_of(t) for t in (held(gm, n) for n in reads) if t is not None]


def _run_algorithms(graphs: Sequence[fx.GraphModule], run: _Run) -> None:
    """What the config asks for before ranges are observed; quantizers are off, so that all is float."""
    done = [gm.meta.setdefault(DONE, []) for gm in graphs]  # not empty where a calibration has failed after them
    if any(names != done[0] for names in done):
        raise StateError("algorithms have run on some of these graphs", remedy="Prepare them again, together.")
    for algorithm in graphs[0].meta["graphq_config"].algorithms[len(done[0]) :]:
        run.step = len(done[0])
        ALGORITHMS[algorithm.name](graphs, run, **algorithm.args)
        for names in done:
            names.append(algorithm.name)


class _Run:
    """The calibration data for an algorithm: see `graphq.algorithms.base.Run`."""

    def __init__(self, first: fx.GraphModule, data: Any, show: bool, store: WeightStore | None, frontier: str) -> None:
        self.first, self.data, self.show, self.store = first, data, show, store
        self.on_disk, self.streams, self.step = frontier == "disk", 0, 0

    def __call__(self, watchers: Sequence[tuple[fx.Node, nn.Module]]) -> None:
        if any(on_disk(t) for t in (*self.first.parameters(), *self.first.buffers())):
            raise StateError("this algorithm looks at the whole model while it runs, and its weights are on disk",
                             where="algorithms", remedy="Load the model into memory.")  # fmt: skip
        with watching(self.first, watchers):
            run_calibration(self.first, self.data, progress=self.show)

    def stream(self, gm: fx.GraphModule, *, original: bool = False) -> Stream:
        folder = None
        if self.on_disk and self.store is not None:
            folder = self.store.folder / f"frontier-{self.streams}"
            self.streams += 1
        self.data = _listed(self.data)  # another stream is to go through the same samples
        return Stream(gm, self.data, original=original, folder=folder)

    def close(self) -> None:
        if self.store is not None:
            for folder in self.store.folder.glob("frontier-*"):  # of a run that was stopped, too
                shutil.rmtree(folder, ignore_errors=True)

    def progress(self, items: Iterable[T], label: str) -> Iterator[T]:
        return progress_of(items, label, show=self.show)


class _Statistics:
    """What calibration gathers for one graph: by its quantizers' observers, and by watchers of its tensors."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.quantizers = gm, quantizers(gm)
        self.masks = mask_watchers(gm)
        self.means = mean_watchers(gm, self.masks) if gm.meta["graphq_config"].bias_correction else {}
        self.maxima = maxima_watchers(gm) if gm.meta["graphq_target"].guards_by_data else {}

    def observe(self) -> None:
        for q in self.quantizers.values():
            q.observe()
        self.importance = importance_watchers(self.gm, self.masks)

    def watchers(self) -> Iterator[tuple[str, nn.Module]]:
        """(name of the tensor, module that sees it)."""
        if self.means or self.importance:
            yield from ((n.name, mask) for n, mask in self.masks)
        yield from ((n.name, w) for (n, _), w in self.means.items())
        yield from ((n.name, w) for (n, _), w in self.maxima.items())
        yield from ((n.name, w) for (n, _), w in self.importance.items())

    def activations(self) -> Iterator[tuple[str, TensorQuantizer]]:
        """(name of the tensor, its quantizer), for quantizers that see data."""
        for node, quantizer in self._calls():
            if not quantizer.constant:
                yield str(node.all_input_nodes[0]), quantizer

    def freeze(self) -> None:
        self.wanted = mean_products(self.gm, self.means, original=True) if self.means else {}
        give_importance(self.gm, self.importance)
        for node, quantizer in self._calls():
            if quantizer.constant and not quantizer.settled:
                tensor = parameter(self.gm, node.all_input_nodes[0])
                assert tensor is not None
                quantizer.update(tensor)
        shared = shared_magnitudes(self.gm)
        for q in self.quantizers.values():
            q.freeze(shared.get(q))

    def forget(self) -> None:
        for q in self.quantizers.values():
            q.observer, q.state = None, "off"

    def fit(self) -> None:
        """Make weights and biases what the target's kernels take."""
        fit_bias(self.gm)
        round_states(self.gm)
        if self.gm.meta["graphq_target"].saturates:
            guard_saturation(self.gm, self.maxima)
        if self.means:
            correct_bias(self.gm, self.means, self.wanted)

    def _calls(self) -> Iterator[tuple[fx.Node, TensorQuantizer]]:
        for node in self.gm.graph.nodes:
            quantizer = self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(quantizer, TensorQuantizer):
                yield node, quantizer
