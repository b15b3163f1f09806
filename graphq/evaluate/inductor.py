"""torch.compile: run an exported program, and read from Inductor's graph which ops became int8 kernels."""

from __future__ import annotations

from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphq.errors import RuntimeMismatch
from graphq.graph.capture import example_of
from graphq.graph.decision import Decision
from graphq.graph.optable import family_of

NAME = "graphq"
KERNELS = {"qconv": "qconv_pointwise", "qlinear": "qlinear_pointwise"}


def compile_program(path: str | Path, spy: Callable[[fx.Graph], None] | None = None) -> Callable[..., Any]:
    """The program as torch.compile runs it: with Inductor's int8 patterns, weights frozen. spy: sees the graph before
    code is generated, when the program is first called.

    Raises RuntimeMismatch where torchao, which has the patterns, is not installed, or the file is damaged.
    """
    import torch._inductor.config as inductor

    try:
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401  (registers the patterns)
    except ImportError as e:
        raise RuntimeMismatch("torchao is not installed", remedy="pip install 'graphq[torch-compile]'") from e
    compiled = torch.compile(load_program(path).module(), fullgraph=True)
    settings: dict[str, Any] = {"freezing": True}
    if spy is not None:
        settings |= {"post_grad_custom_post_pass": spy, "fx_graph_cache": False, "force_disable_caches": True}

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), inductor.patch(settings):
            return compiled(*args, **kwargs)

    return run


def load_program(path: str | Path) -> torch.export.ExportedProgram:
    """Read a .pt2 file. Raises RuntimeMismatch if it is missing or damaged."""
    if not Path(path).is_file():
        raise RuntimeMismatch("there is no such file", where=str(path), remedy="Export the model first.")
    try:
        return torch.export.load(path)
    except Exception as e:  # zip, JSON and pickle each raise their own kinds
        raise RuntimeMismatch(
            f"this is not a program of torch.export: {type(e).__name__}", where=str(path), remedy="Export it again."
        ) from e


class FoundInInductor:
    """Which kernel of the compiled program computes an op: an int8 kernel, or "fused" into a loop."""

    def __init__(self, gm: fx.GraphModule, path: str | Path) -> None:
        ends: dict[str, str] = {}

        def spy(graph: fx.Graph) -> None:
            for node in graph.nodes:
                kind = next((k for k in KERNELS if k in str(node.target)), None)
                name = (node.meta.get("custom") or {}).get(NAME)
                if node.op == "call_function" and kind is not None and "prepack" not in node.name and name:
                    ends[name] = KERNELS[kind]

        example = example_of(gm)
        compile_program(path, spy)(*example.args, **example.kwargs)
        self.made: dict[str, str] = {}
        by_name = {n.name: n for n in gm.graph.nodes}
        for name, kernel in ends.items():
            if name in by_name:
                self.made |= dict.fromkeys(_back_to_layer(by_name[name], ends), kernel)

    def kernel(self, node: fx.Node, decision: Decision) -> str:
        if decision.action == "skip":
            return ""
        head = decision.head.name if decision.head is not None else node.name  # a pad in front runs on the codes
        return self.made.get(node.name) or self.made.get(head, "fused")


def _back_to_layer(end: fx.Node, ends: Container[str]) -> list[str]:
    """The ops of a kernel, from the one that it ends with back to its convolution or linear: the nearest one that is
    not the end of another kernel, since a sum that is taken in has a second operand."""
    paths, seen = [[end]], {end}
    while paths:
        for path in paths:
            last = path[-1]
            if family_of(last.target) in ("conv", "linear") and (last is end or last.name not in ends):
                return [n.name for n in path]
        reach, paths = [p for p in paths if p[-1] is end or p[-1].name not in ends], []
        for path in reach:
            new = [n for n in path[-1].all_input_nodes if n.op == "call_function" and n not in seen]
            seen.update(new)
            paths += [[*path, n] for n in new]
    return [end.name]
