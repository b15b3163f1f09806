"""llm-compressor's `config_groups` (compressed-tensors' QuantizationArgs).

Precedence there: an exact name beats a regular expression, that beats a class, and of several of one kind the first
group counts. Here the last rule wins, so the rules come the other way round, and `ignore` last of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graphq.config.config import QuantConfig, Rule
from graphq.config.imports import plain, take
from graphq.config.known import LLM_COMPRESSOR
from graphq.config.scheme import Scheme
from graphq.config.spec import QuantSpec
from graphq.errors import ConfigError, did_you_mean

FLOATS = {8: "fp8_e4m3", 6: "fp6_e2m3", 4: "fp4_e2m1"}
OBSERVERS: dict[str | None, tuple[str, dict[str, Any]]] = {
    None: ("minmax", {}),
    "memoryless_minmax": ("minmax", {}),
    "static_minmax": ("minmax", {}),
    "minmax": ("moving_average", {"rate": 0.01}),
    "memoryless_mse": ("mse_grid", {}),
    "mse": ("mse_grid", {"rate": 0.01}),
}
SCALES = {"float32": "float", "uint8": "e8m0", "float8_e4m3fn": "e4m3"}
KWARGS = {"averaging_constant": "rate", "maxshrink": "shrink", "grid": "grid", "norm": "norm", "patience": "patience"}
ARGS = (
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "scale_dtype", "zp_dtype",
    "observer", "observer_kwargs", "actorder",
)  # fmt: skip


def from_config_groups(
    groups: Mapping[str, Any],
    ignore: Sequence[str] = (),
    *,
    kv_cache_scheme: Any = None,
    name: str = "config_groups",
) -> QuantConfig:
    """groups: group name → {targets, weights, input_activations, output_activations}, or preset name → targets.
    kv_cache_scheme: QuantizationArgs of the keys and values that enter attention."""
    ranked: list[tuple[int, Rule]] = []
    for group, value in groups.items():
        targets, scheme = _group(group, value)
        for target in targets:
            why = f"group {group!r} of config_groups: name beats regex beats class, then the first group"
            ranked.insert(0, (_rank(target), Rule(select=selector(target), scheme=scheme, reason=why)))
    ordered = [r for _, r in sorted(ranked, key=lambda item: item[0])]
    why = "ignored by config_groups"
    ignored = [Rule(select=selector(s), scheme=None, optional=True, reason=why) for s in ignore]
    cache = [] if kv_cache_scheme is None else [Rule(select="attention", scheme=Scheme(cache=spec_of(kv_cache_scheme)))]
    return QuantConfig(name=name, rules=(*ordered, *cache, *ignored))


def _rank(target: str) -> int:
    """Classes 0, regular expressions 1, names 2."""
    return 1 if _regex(target) else 0 if target[:1].isupper() and "." not in target else 2


def _group(group: str, value: Any) -> tuple[list[str], Scheme]:
    if isinstance(value, (list, tuple)):
        if group.upper() not in LLM_COMPRESSOR:
            raise ConfigError(f"unknown preset {group!r}", remedy=did_you_mean(group.upper(), LLM_COMPRESSOR))
        return list(value), LLM_COMPRESSOR[group.upper()]
    known = ("targets", "weights", "input_activations", "output_activations", "format")
    fields = take(plain(value), f"config group {group!r}", known)
    parts = {"weight": "weights", "input": "input_activations", "output": "output_activations"}
    specs = {ours: spec_of(fields[theirs]) for ours, theirs in parts.items() if theirs in fields}
    return list(fields.get("targets", ["Linear"])), Scheme(**specs)


def _regex(target: str) -> bool:
    return target.startswith("re:")


def selector(target: str) -> str:
    """There a regular expression has to match the beginning of a name, here all of it."""
    return f"re:(?:{target[3:]}).*" if _regex(target) else target


def spec_of(args: Any) -> QuantSpec:
    """QuantizationArgs as a spec. Raises ConfigError for what has no counterpart."""
    a = take(plain(args), "QuantizationArgs", ARGS)
    bits, kind = a.get("num_bits", 8), str(getattr(a.get("type"), "value", a.get("type", "int")))
    if a.get("actorder"):
        raise ConfigError("actorder is a matter of GPTQ, not of the format", remedy="Leave it out here.")
    if kind == "float" and bits not in FLOATS:
        raise ConfigError(f"there is no float format with {bits} bits", remedy=f"num_bits: {list(FLOATS)}.")
    size = a.get("group_size")
    strategy = a.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    strategy = str(getattr(strategy, "value", strategy))
    implied = "float8_e4m3fn" if strategy == "tensor_group" else "float32"
    dtype = str(a.get("scale_dtype", implied)).removeprefix("torch.")
    if dtype not in SCALES:
        raise ConfigError(f"scales in {dtype} have no counterpart", remedy=f"scale_dtype: one of {list(SCALES)}.")
    dynamic = a.get("dynamic", False)
    observer, options = OBSERVERS.get(a.get("observer"), (a.get("observer"), {}))
    given = take(a.get("observer_kwargs", {}), "observer_kwargs", tuple(KWARGS))
    options = options | {KWARGS[k]: v for k, v in given.items()}
    fields: dict[str, Any] = {
        "format": FLOATS[bits] if kind == "float" else f"int{bits}",
        "symmetric": a.get("symmetric", True),
        "granularity": {"tensor_group": "group", "attn_head": "head"}.get(strategy, strategy),
        "scale": SCALES[dtype],
        "dynamic": getattr(dynamic, "value", dynamic),
        "span": "full" if kind == "int" and a.get("symmetric", True) else "positive",
        "observer": observer,
        "observer_args": options,
    }
    if strategy in ("group", "tensor_group"):
        fields["group_size"] = size
    if strategy == "block":
        block = a["block_structure"]
        fields["block"] = tuple(int(n) for n in block.split("x")) if isinstance(block, str) else tuple(block)
        fields["ragged"] = True
    return QuantSpec(**fields)
