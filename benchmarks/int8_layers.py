"""Are convolutions and linears, in OpenVINO and torch.compile, the int8 layers that explain names?

    python benchmarks/int8_layers.py [--models effnet minilm resnet50 vit smollm2] [--smollm2 DIR] [--json F] [--check]

Models, samples and what they need are those of kernels.py. "layers" are the convolutions and linears that are
quantized, "as predicted" those that the compiled model computes by the predicted layer; "agrees": the file gives what
was simulated (`graphq.verify`). Of SmolLM2 the head stays float.

--check exits with 1 where a layer is another than predicted, or a file does not agree.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

import graphq
from graphq import QuantConfig, Rule
from kernels import MODELS

TARGETS = {"openvino": ".onnx", "torch_compile": ".pt2"}
FLOAT_HEAD = Rule(select="embedding | *lm_head", optional=True, reason="tables and the head")


def measure(model, data, shapes, config: QuantConfig, target: str, scratch: Path) -> dict[str, float]:
    graph = graphq.quantize(model, config, data, target=target, dynamic_shapes=shapes, progress=False)
    path = graphq.export(graph, scratch / f"model{TARGETS[target]}")
    explanation = graphq.explain(graph, path)
    layers = [r for r in explanation.rows if r.action == "quantize" and r.op in ("conv2d", "linear")]
    result = graphq.verify(graph, path, data[:1])
    return {
        "layers": len(layers),
        "as predicted": sum(r.found == r.predicted for r in layers),
        "other ops not as predicted": len(explanation.disagreements) - sum(not r.agrees for r in layers),
        "agrees": result.agrees,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.models:
            model, data, shapes, _ = MODELS[name](options.smollm2 or Path(scratch) / "smollm2")
            config = QuantConfig.load("int8")
            config = config.with_rules(FLOAT_HEAD) if name == "smollm2" else config
            for target in TARGETS:
                row = figures[f"{name}, {target}"] = measure(model, data, shapes, config, target, Path(scratch))
                print(name, target, row, flush=True)
    table = Table("model", "target", *next(iter(figures.values())))
    for key, row in figures.items():
        table.add_row(*key.split(", "), *map(str, row.values()))
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))
    bad = [k for k, r in figures.items() if r["as predicted"] != r["layers"] or not r["layers"] or not r["agrees"]]
    for line in bad:
        print("does not hold:", line)
    return 1 if options.check and bad else 0


if __name__ == "__main__":
    sys.exit(main())
