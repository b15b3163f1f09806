"""OpenVINO: run an exported file, and read from its runtime model which layer computes an op, in which precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import fx

from graphq.errors import RuntimeMismatch
from graphq.graph.decision import Decision, decision_of

INTEGERS = ("u8", "i8")
INTEGER_LAYERS = ("Convolution", "FullyConnected", "MatMul", "Deconvolution")


class OpenVino:
    """A compiled model on the CPU; floats stay float32. Raises RuntimeMismatch where openvino is not installed or
    refuses the file."""

    def __init__(self, path: str | Path) -> None:
        try:
            import openvino
        except ImportError as e:
            raise RuntimeMismatch("openvino is not installed", remedy="pip install 'graphq[openvino]'") from e
        core = openvino.Core()
        try:
            model = core.read_model(str(path))
            self.compiled: Any = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        except RuntimeError as e:
            raise RuntimeMismatch(
                f"OpenVINO refuses this file: {' '.join(str(e).split())[-300:]}",
                where=str(path),
                remedy="Export the float model: if that is refused too, it is an op of the model that OpenVINO lacks.",
            ) from e

    def run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs of the model, in order."""
        result = self.compiled(feed)
        return [np.array(result[o]) for o in self.compiled.outputs]

    def layers(self) -> dict[str, tuple[str, str]]:
        """ONNX node → (type of the layer that computes it, its precision); what was folded away is missing."""
        found: dict[str, tuple[str, str]] = {}
        for op in self.compiled.get_runtime_model().get_ordered_ops():
            info = {k: str(v.astype(str)) for k, v in op.get_rt_info().items() if hasattr(v, "astype")}
            kind, precision = info.get("layerType", ""), info.get("runtimePrecision", "")
            for name in info.get("originalLayersNames", "").split(","):
                if kind in INTEGER_LAYERS or name not in found:
                    found[name.partition("/")[0]] = (kind, precision)
        return found


class FoundInOpenVino:
    """Which layer of the runtime model computes an op of a graph: its type, with the precision where that is float."""

    def __init__(self, path: str | Path) -> None:
        layers = OpenVino(path).layers()
        self.made: dict[str, str] = {}
        for node in onnx.load(path, load_external_data=False).graph.node:
            name = next((p.value for p in node.metadata_props if p.key == "graphq.node"), "")
            if name and node.name in layers:
                kind, precision = layers[node.name]
                integer = precision in INTEGERS or kind not in INTEGER_LAYERS
                self.made[name] = kind if integer else f"{kind} {precision}"

    def kernel(self, node: fx.Node, decision: Decision) -> str:
        if decision.action == "skip":
            return ""
        head = decision_of(decision.head) if decision.head is not None else decision
        assert head is not None
        names = [f"{node.name}_matmul", node.name, *(m.name for m in head.members)]
        if head.pattern == "Add":  # of a sum that is computed in a convolution no name is left
            names += [n.name for n in node.all_input_nodes]
        return next((self.made[n] for n in names if n in self.made), "fused")
