"""OneComp's selection: six filters one after the other, then at most `num_layers` layers, in the order of the model."""

from __future__ import annotations

from collections.abc import Sequence

from graphq.config.config import QuantConfig, Rule
from graphq.config.scheme import Scheme
from graphq.config.spec import QuantSpec
from graphq.errors import ConfigError


def from_onecomp(
    *,
    wbits: int = 4,
    groupsize: int = -1,
    sym: bool = True,
    target_layer_types: Sequence[str | type] = ("Linear",),
    include_layer_names: Sequence[str] | None = None,
    include_layer_keywords: Sequence[str] | None = None,
    exclude_layer_names: Sequence[str] = ("lm_head",),
    exclude_layer_keywords: Sequence[str] | None = None,
    num_layers: int | None = None,
    layers: Sequence[str] | None = None,
    name: str = "onecomp",
) -> QuantConfig:
    """Weights of `wbits` bits per channel (groupsize -1) or group. layers: module paths in the order of the model, for
    num_layers. Raises ConfigError where fewer layers than num_layers are left, as OneComp does."""
    span = "full" if sym else "positive"
    if groupsize > 0:
        spec = QuantSpec(format=f"int{wbits}", symmetric=sym, granularity="group", group_size=groupsize, span=span)
    else:
        spec = QuantSpec(format=f"int{wbits}", symmetric=sym, granularity="channel", span=span)
    types = " | ".join(t if isinstance(t, str) else t.__name__ for t in target_layer_types)
    included = [types]
    if include_layer_names is not None:
        included = [f"{t} & {n}" for n in include_layer_names for t in types.split(" | ")]
    if include_layer_keywords is not None:
        included = [f"{i} & *{k}*" for k in include_layer_keywords for i in " | ".join(included).split(" | ")]
    excluded = [*exclude_layer_names, *(f"*{k}*" for k in exclude_layer_keywords or ())]
    rules = [
        Rule(select=" | ".join(included), scheme=Scheme(weight=spec), reason="OneComp: type, included names, keywords"),
        *(Rule(select=s, scheme=None, optional=True, reason="OneComp: excluded") for s in excluded),
    ]
    if num_layers is not None:
        rules += _beyond(num_layers, layers, include_layer_names, include_layer_keywords, excluded)
    return QuantConfig(name=name, rules=tuple(rules))


def _beyond(
    number: int, layers: Sequence[str] | None, names: Sequence[str] | None, words: Sequence[str] | None, out: list[str]
) -> list[Rule]:
    """Rules that leave all layers float that come after the first `number` which the filters let through."""
    if layers is None:
        raise ConfigError("num_layers counts layers in the order of the model", remedy="Pass layers=[paths in order].")
    left = [
        path
        for path in layers
        if (names is None or path in names)
        and (words is None or any(w in path for w in words))
        and not any(s.strip("*") in path if "*" in s else s == path for s in out)
    ]
    if len(left) < number:
        raise ConfigError(f"num_layers is {number}, and the filters leave {len(left)} layers", remedy="Ask for fewer.")
    why = f"OneComp: not among the first {number} layers"
    return [Rule(select=path, scheme=None, optional=True, reason=why) for path in left[number:]]
