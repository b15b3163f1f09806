"""What an algorithm is: a function of prepared graphs that changes them before their ranges are observed.

    @ALGORITHMS.register("smoothquant")
    def smoothquant(graphs, run, *, alpha="search"): ...

graphs: made of one model for several targets, all computing the float model; one as a rule. run: the calibration data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor, fx, nn

from graphq.errors import NOT_FINITE, CalibrationError, ConfigError, did_you_mean
from graphq.graph.view import LayerView, set_parameter
from graphq.registry import Registry

if TYPE_CHECKING:
    from graphq.algorithms.store import WeightStore

T = TypeVar("T")
RESCALED = "graphq_rescaled"  # in a graph's meta: ops whose values are not to be those of the float model


class Alive(Protocol):
    """Values of every batch, by the node that made them."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int, /) -> Mapping[fx.Node, Any]: ...


class Stream(Protocol):
    """All samples on their way through a graph, none ahead of the others."""

    masks: list[Tensor | None]  # for every batch: which tokens count [n, length], where the batch says so
    order: list[fx.Node]  # the ops, without those on parameters alone

    @property
    def frontier(self) -> Alive:
        """Of every batch what is alive where it stands."""

    def until(self, node: fx.Node) -> list[Tensor]:
        """Run up to this node; its values, one for each batch."""

    def trial(
        self, number: int, stop: fx.Node, read: Mapping[fx.Node, Tensor] = ..., keep: Sequence[fx.Node] = ...
    ) -> Mapping[fx.Node, Any]:
        """One batch from where it stands to a node and not for good, with other weights: what is alive there, and what
        is to be kept. With gradients, where they are on."""


class Run(Protocol):
    """The calibration data, as often as an algorithm wants them. store: where chosen weights are kept, if anywhere."""

    store: WeightStore | None
    step: int  # the place in the config of the algorithm that runs

    def __call__(self, watchers: Sequence[tuple[fx.Node, nn.Module]]) -> None:
        """Show tensors to modules, given as (node of the first graph, module), in one run over the data."""

    def stream(self, gm: fx.GraphModule, *, original: bool = False) -> Stream:
        """original: with the weights as they were when the stream began."""

    def progress(self, items: Iterable[T], label: str) -> Iterator[T]:
        """The items, with a bar on the screen."""


ALGORITHMS: Registry[Callable[..., None]] = Registry("algorithm", "graphq.algorithms")


def check_arguments(name: str, args: dict[str, Any]) -> None:
    """Raises ConfigError for a name or arguments that no algorithm has."""
    known = [p.name for p in inspect.signature(ALGORITHMS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for given in args:
        if given not in known:
            raise ConfigError(
                f"the algorithm {name!r} has no argument {given!r}", remedy=did_you_mean(given, known or ["none"])
            )


def expect_data(layer: LayerView, count: int, sizes: Tensor | None) -> None:
    """Raises CalibrationError for a layer without inputs, and for inputs that are not finite. count: of them; sizes:
    sums over them, by channel, of magnitudes or squares."""
    if sizes is None or not count:
        remedy = "Give data with at least one sample, of which the mask leaves in a token."
        raise CalibrationError("no calibration data reaches this layer", where=layer.where(), remedy=remedy)
    if not sizes.isfinite().all():
        raise CalibrationError("what this layer reads is not finite", where=layer.where(), remedy=NOT_FINITE)


def mark_rescaled(gm: fx.GraphModule, first: fx.Node, readers: Sequence[fx.Node]) -> None:
    """From this op to what reads it in the end, channels have other scales than in the float model."""
    names, to_see = set(gm.meta.get(RESCALED, ())), [first]
    while to_see:
        node = to_see.pop()
        if node not in readers and node.name not in names:
            names.add(node.name)
            to_see += node.users
    gm.meta[RESCALED] = sorted(names)


def replace_read(gm: fx.GraphModule, old: fx.Node, user: fx.Node, tensor: Tensor, suffix: str) -> fx.Node:
    """Let a node read a new parameter in place of another; the model's own stays as it is."""
    with gm.graph.inserting_before(user):
        new = gm.graph.get_attr(set_parameter(gm, f"{old.target}_{suffix}", tensor))
    new.meta = {**old.meta, "val": tensor}
    user.replace_input_with(old, new)
    return new
