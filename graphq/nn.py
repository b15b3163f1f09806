"""Quantized modules of one's own: quantizers anywhere in a forward, placed by the user's code.

    class QuantLayerNorm(nn.LayerNorm):
        def _setup(self):
            self.input_quantizer = TensorQuantizer()
            self.weight_quantizer = TensorQuantizer()

        def forward(self, input):
            weight = self.weight_quantizer(self.weight)
            return F.layer_norm(self.input_quantizer(input), self.normalized_shape, weight, self.bias, self.eps)

    graphq.register(original_cls=nn.LayerNorm, quantized_cls=QuantLayerNorm)

`graphq.prepare` then traces every nn.LayerNorm as a QuantLayerNorm. What stands at a TensorQuantizer is said by the
config's scheme for that module: `weight` for a `weight_quantizer`, `output` for an `output_quantizer`, `input` for any
other name.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphq.errors import ConfigError
from graphq.graph.ops import HERE


class TensorQuantizer(nn.Module):
    """A place for a quantizer in the forward of a registered module; until then the identity."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = HERE(x)
        return result


_REGISTERED: dict[type[nn.Module], type[nn.Module]] = {}


def register(original_cls: type[nn.Module], quantized_cls: type[nn.Module]) -> None:
    """Trace modules of exactly `original_cls` as `quantized_cls`, whose `_setup()` makes its quantizers.

    Raises ConfigError for a class without `_setup`, or that is not derived from the original.
    """
    if not callable(getattr(quantized_cls, "_setup", None)):
        raise ConfigError(
            f"{quantized_cls.__name__} has no method _setup", remedy="Make its TensorQuantizers there, as attributes."
        )
    if not issubclass(quantized_cls, original_cls):
        raise ConfigError(
            f"{quantized_cls.__name__} is not derived from {original_cls.__name__}",
            remedy="A module becomes the quantized one by its class: derive it.",
        )
    _REGISTERED[original_cls] = quantized_cls


def unregister(original_cls: type[nn.Module]) -> None:
    """Undo `register`. Raises ConfigError for a class that is not registered."""
    if original_cls not in _REGISTERED:
        raise ConfigError(f"{original_cls.__name__} is not registered", remedy="Nothing is to be undone.")
    del _REGISTERED[original_cls]


def with_registered(model: nn.Module) -> nn.Module:
    """The model with its registered modules replaced, in a copy that shares all tensors; itself if it has none."""
    if isinstance(model, fx.GraphModule) or not isinstance(model, nn.Module):
        return model
    if not any(type(m) in _REGISTERED for m in model.modules()):
        return model
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared)
    for module in list(model.modules()):
        quantized = _REGISTERED.get(type(module))
        if quantized is not None:
            module.__class__ = quantized
            module._setup()  # type: ignore[operator]
    return model


@torch.no_grad()
def first_call(model: nn.Module, loop: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) with which a calibration loop calls the model first; the loop is stopped there."""

    class Seen(Exception):
        pass

    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise Seen

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        loop(model)  # type: ignore[operator]
    except Seen:
        pass
    finally:
        handle.remove()
    return seen[0] if seen else ((), {})
