"""A weight that an algorithm has chosen goes into the graph, by way of the store where there is one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from graphq.algorithms.grid import Grid
from graphq.algorithms.layers import Layer
from graphq.algorithms.results import WeightResult
from graphq.algorithms.store import WeightStore, placeholders
from graphq.errors import StateError
from graphq.graph.on_disk import digest_of, values_of


def settle(
    layer: Layer, chosen: Tensor, grid: Grid, name: str, result: WeightResult, store: WeightStore | None
) -> None:
    """chosen: the weight as a matrix [out, K], on the grid. name: of the algorithm."""
    if store is None:
        layer.settle(chosen, grid, name, result.words())
        return
    store.put(
        layer.parameter_name, grid.codes(chosen), grid.scale, grid.zero, grid.overall, layer.weight,
        layer.block, layer.spec, layer.view.family, result,
    )  # fmt: skip
    settle_stored(layer, name, store)


def all_stored(layers: Sequence[Layer], store: WeightStore) -> bool:
    """Has an earlier run chosen all of them?"""
    return all(store.get(layer.parameter_name) is not None for layer in layers)


def settle_stored(layer: Layer, name: str, store: WeightStore) -> WeightResult:
    """Take what the store holds. Raises StateError for another's weight."""
    stored = store.get(layer.parameter_name)
    assert stored is not None
    original, result = layer.weight, stored.result
    if stored.about["original"] != digest_of(original) or stored.spec != layer.spec:
        raise StateError(
            "the store holds this weight of another model",
            where=str(stored.path),
            remedy="Name a new folder, or delete this one.",
        )
    weight, scale, zero = placeholders(stored, original.device)
    if not layer.is_on_disk:
        weight, scale, zero = (values_of(t) for t in (weight, scale, zero))
    overall = stored.tensors()["overall"].clone().to(original.device)  # a view would keep the file mapped
    layer.settle_on(weight, scale, zero, overall, name, result.words())
    return result
