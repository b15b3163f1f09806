"""What a rule is: a function of the graph that yields findings; its docstring is its line in the documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import onnx

from graphq.errors import TargetError, did_you_mean
from graphq.lint.graph import Graph


@dataclass(frozen=True)
class Finding:
    """One fault. node: where; consequence: what the runtime makes of it; remedy: what to do; fixable: by `fix`."""

    rule: str
    node: str
    consequence: str
    remedy: str
    fixable: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Rule = Callable[[Graph], Iterator[Finding]]
RULES: dict[str, dict[str, Rule]] = {"onnxruntime": {}, "tensorrt": {}}


def rule(*targets: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for target in targets:
            RULES[target][function.__name__] = function
        return function

    return register


def lint(model: onnx.ModelProto, target: str = "onnxruntime", *, saturates: bool = False) -> list[Finding]:
    """Everything that the rules of a target find, in the order of the rules. saturates: for x86 CPUs without VNNI."""
    if target not in RULES:
        raise TargetError(f"there are no lint rules for {target!r}", remedy=did_you_mean(target, RULES))
    graph = Graph(model)
    names = [n for n in RULES[target] if saturates or n != "saturation"]
    return [finding for name in names for finding in RULES[target][name](graph)]
