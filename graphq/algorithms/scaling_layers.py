"""Groups of linears by name, for those who do not want what the graph says: AMD Quark's `scaling_layers`.

    {"prev_op": "input_layernorm", "layers": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]}
    {"prev_op": "self_attn.v_proj", "layers": ["self_attn.o_proj"],
     "condition": "module.self_attn.v_proj.weight.shape == module.self_attn.o_proj.weight.shape"}

Names are those inside a decoder layer. An entry whose condition does not hold for a layer is left out there; one whose
scale cannot be folded into its prev_op is an error, as the graph shows it. `inp`, `module2inspect` and `help` are
allowed and say nothing that the graph does not.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from graphq.algorithms.scaling import Group, Pair, pair_of
from graphq.errors import ConfigError, did_you_mean

DECODER_LAYERS = "model.layers"
KEYS = {"prev_op", "layers", "inp", "module2inspect", "condition", "help"}
ALLOWED = (
    ast.Expression, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.Attribute, ast.Subscript, ast.Constant, ast.Name,
    ast.Load, ast.And, ast.Or, ast.Not, ast.USub, ast.cmpop, ast.Tuple, ast.List,
)  # fmt: skip
Entries = Sequence[Mapping[str, Any]]


def listed(
    gm: fx.GraphModule, named: dict[str, Group], entries: Entries | None, within: str | None, where: str
) -> dict[str, Group]:
    """The groups that the entries name, or all. within: path of the list of decoder layers, or of its end.

    Raises ConfigError for entries that are none, that name nothing, or other groups than the graph has.
    """
    if entries is None:
        if within is not None:
            raise ConfigError("model_decoder_layers is where scaling_layers are", where=where,
                              remedy="Leave it out, or say scaling_layers too.")  # fmt: skip
        return named
    within = within or DECODER_LAYERS
    pairs = {name: pair_of(gm, group) for name, group in named.items()}
    by_linears = {frozenset(pair.linears): name for name, pair in pairs.items()}
    found: dict[str, Group] = {}
    if isinstance(entries, Mapping):
        raise ConfigError("scaling_layers is a list of entries", where=where, remedy="Put the entry into a list.")
    for entry in entries:
        _expect_entry(entry, where)
        here = [path for path in _decoder_layers(gm, within, where) if _holds(entry, gm.get_submodule(path), where)]
        for path in here:
            linears = frozenset(f"{path}.{name}" for name in entry["layers"])
            name = by_linears.get(linears)
            if name is None:
                raise _no_group(linears, by_linears, where)
            _expect_folded(pairs[name], f"{path}.{entry['prev_op']}", where)
            found[name] = named[name]
    if not found:
        raise ConfigError("scaling_layers: no condition holds, so that nothing is scaled", where=where,
                          remedy="Leave scaling_layers out: pairs are found in the graph.")  # fmt: skip
    return {name: group for name, group in named.items() if name in found}


def _expect_entry(entry: Mapping[str, Any], where: str) -> None:
    unknown, named = set(entry) - KEYS, entry.get("layers")
    if unknown or not isinstance(entry.get("prev_op"), str) or not isinstance(named, (list, tuple)) or not named:
        shape = "An entry has prev_op, a name, and layers, a list of names."
        remedy = did_you_mean(min(unknown), KEYS) if unknown else shape
        raise ConfigError(f"scaling_layers: {dict(entry)!r}", where=where, remedy=remedy)


def _decoder_layers(gm: fx.GraphModule, within: str, where: str) -> list[str]:
    """Paths of the modules of the list at `within`."""
    found = []
    for path, _ in gm.named_modules():
        parent, _, last = path.rpartition(".")
        if last.isdigit() and (parent == within or parent.endswith(f".{within}")):
            found.append(path)
    if not found:
        parents = {path.rpartition(".")[0] for path, _ in gm.named_modules() if path.rpartition(".")[2].isdigit()}
        raise ConfigError(
            f"model_decoder_layers: there is no list of layers at {within!r}", where=where,
            remedy=did_you_mean(within, parents or {"none"}),
        )  # fmt: skip
    return found


def _holds(entry: Mapping[str, Any], module: nn.Module, where: str) -> bool:
    """The condition, a comparison of attributes of `module`: nothing can be called."""
    text = entry.get("condition")
    if text is None:
        return True
    try:
        tree = ast.parse(text, mode="eval")
        for node in ast.walk(tree):
            private = isinstance(node, ast.Attribute) and node.attr.startswith("_")
            if not isinstance(node, ALLOWED) or private or (isinstance(node, ast.Name) and node.id != "module"):
                raise ConfigError(
                    f"scaling_layers: a condition compares attributes of `module`, not {ast.unparse(node)!r}",
                    where=f"{where}: {text}",
                    remedy="Write module.a.weight.shape == module.b.weight.shape, say.",
                )
        return bool(eval(compile(tree, "condition", "eval"), {"__builtins__": {}}, {"module": module}))
    except (SyntaxError, AttributeError, TypeError, IndexError, KeyError) as e:
        raise ConfigError(f"scaling_layers: this condition cannot be told: {e}", where=f"{where}: {text}",
                          remedy="Its names are those inside a decoder layer.") from e  # fmt: skip


def _no_group(linears: frozenset[str], known: Mapping[frozenset[str], str], where: str) -> ConfigError:
    near = max(known, key=lambda k: len(k & linears), default=frozenset[str]())
    if not near & linears:
        every = sorted({path for k in known for path in k})
        remedy = did_you_mean(min(linears), every)
        return ConfigError(f"scaling_layers: no quantized linear is called {min(linears)}", where=where, remedy=remedy)
    return ConfigError(
        "scaling_layers: linears that read one tensor share its scale, and an entry names others",
        where=f"{where}: {', '.join(sorted(linears))}",
        remedy=f"Name {', '.join(sorted(near))}.",
    )


def _expect_folded(pair: Pair, wanted: str, where: str) -> None:
    if pair.into != wanted:
        instead = f"it folds into {pair.into}" if pair.into else "it would be a multiplication"
        raise ConfigError(
            f"scaling_layers: the scale of these does not fold into {wanted}: {instead}",
            where=f"{where}: {', '.join(pair.linears)}",
            remedy="Mend prev_op, or leave the entry out, or give it a condition.",
        )
