"""TICO's PTQConfig: defaults for weights and activations, and a tree of overrides, of which the deepest wins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from graphq.config.config import QuantConfig, Rule
from graphq.config.imports import plain, take
from graphq.config.known import LAYERS
from graphq.config.scheme import Scheme
from graphq.config.spec import QuantSpec
from graphq.errors import ConfigError

LEAVES = {"weight": "weight", "act_in": "input", "act_out": "output"}
OBSERVERS = {"minmax": "minmax", "ema": "moving_average", "percentile": "percentile", "mx": "minmax"}


def from_tico(config: Any, *, name: str = "tico") -> QuantConfig:
    """config: {"activation": spec, "weight": spec, "overrides": {"model": {"layers": …}} or {"a.b.act_out": spec}}."""
    c = take(plain(config), "a TICO config", ("activation", "weight", "overrides"))
    weight = spec_of(c.get("weight", {"dtype": "uint8"}), weight=True)
    nothing = "activation" in plain(config) and "activation" not in c
    activation = None if nothing else spec_of(c.get("activation", {"dtype": "uint8"}))
    rules = [Rule(select=LAYERS, scheme=Scheme(weight=weight, input=activation), reason="TICO's defaults")]
    for path, value in sorted(_leaves(c.get("overrides", {})), key=lambda item: item[0].count(".")):
        layer, _, leaf = path.rpartition(".")
        if leaf not in LEAVES:
            raise ConfigError(f"{leaf!r} is no tensor of a layer", where=path, remedy=f"One of {list(LEAVES)}.")
        part: Any = LEAVES[leaf]
        spec = spec_of(value, weight=part == "weight")
        why = f"TICO's override {path!r}; the deepest wins"
        rules.append(Rule(select=layer, scheme=Scheme(**{part: spec}), only=(part,), reason=why))
    return QuantConfig(name=name, rules=tuple(rules))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dot path, spec) of every leaf of a tree whose keys may be dot paths themselves."""
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and "dtype" not in value and "elem_format" not in value and "format" not in value:
            yield from _leaves(value, path)
        else:
            yield path, value


def spec_of(value: Any, *, weight: bool = False) -> QuantSpec | None:
    """affine(dtype, qscheme, observer), mx(elem_format, axis) or no_quant(), as a mapping."""
    if value is None or value == "no_quant":
        return None
    fields = take(plain(value), "a TICO spec", ("dtype", "qscheme", "observer", "elem_format", "axis"))
    if "elem_format" in fields:
        return QuantSpec(format=f"mx{fields['elem_format']}", axis=fields.get("axis"), dynamic=not weight)
    dtype = str(fields.get("dtype", "uint8"))
    unsigned = dtype.startswith("u")
    scheme = str(fields.get("qscheme") or (
        "per_channel_asymm" if unsigned and weight else "per_tensor_asymm" if unsigned else "per_tensor_symm"
    ))  # fmt: skip
    symmetric = not scheme.endswith("asymm")
    if unsigned and symmetric:
        raise ConfigError(f"{dtype} with {scheme}: unsigned formats are asymmetric there", remedy="Use a signed dtype.")
    observer = str(fields.get("observer", "minmax"))
    if observer not in OBSERVERS:
        raise ConfigError(f"TICO's observer {observer!r} has no counterpart", remedy=f"One of {list(OBSERVERS)}.")
    return QuantSpec(
        format=dtype, symmetric=symmetric, granularity="channel" if "channel" in scheme else "tensor",
        observer=OBSERVERS[observer], observer_args={"rate": 0.1} if observer == "ema" else {},
    )  # fmt: skip
