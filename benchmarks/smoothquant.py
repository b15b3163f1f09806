"""MiniLM with int8 weights and activations: SmoothQuant's α searched for each group of linears, and fixed ones.

    python benchmarks/smoothquant.py [--json FILE] [--check]

64 sentences for calibration, 64 others for the SQNR of the exported file as ONNX Runtime computes it; latencies of a
batch of 8 in turns, as ratios to plain int8 ("none").

--check exits with 1 unless every file computes what was simulated, and the searched one has 20 dB or more, no less than
any fixed α but for half a decibel, and takes at most 1.05 of the time of plain int8.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import graphq
import zoo
from graphq import QuantConfig
from graphq.config.config import Algorithm
from graphq.evaluate.compare import OutputMetrics
from graphq.evaluate.latency import measure
from graphq.evaluate.taps import session

CALIBRATION, HELD = 64, 64
ALPHAS = (None, 0.3, 0.5, 0.7, 0.8, "search")
SLOWER, NEAR, ROUNDS = 1.05, 0.5, 41


def config(alpha: float | str | None) -> QuantConfig:
    algorithms = () if alpha is None else (Algorithm(name="smoothquant", args={"alpha": alpha}),)
    return QuantConfig.load("int8_smoothquant").model_copy(update={"algorithms": algorithms})


def figures(folder: Path) -> dict[str, dict[str, float]]:
    model, found, files = zoo.minilm(), {}, {}
    data, held = zoo.rows(zoo.sentences(CALIBRATION, seed=0)), zoo.rows(zoo.sentences(HELD, seed=1), 8)
    for alpha in ALPHAS:
        name = "none" if alpha is None else f"α = {alpha}" if isinstance(alpha, float) else "searched"
        graph = graphq.quantize(model, config(alpha), data, dynamic_shapes="batch+sequence", progress=False)
        files[name] = graphq.export(graph, folder / f"{len(files)}.onnx")
        metrics, run = OutputMetrics(), session(files[name])
        with torch.no_grad():
            for batch in held:
                result = run.run(None, {k: v.numpy() for k, v in batch.items()})[0]
                metrics.add([model(**batch).last_hidden_state], [torch.from_numpy(result)])
        agrees = graphq.verify(graph, files[name], held[:2]).agrees
        found[name] = {"SQNR": metrics.result().sqnr, "as simulated": agrees}
    for latency in measure(files, {k: v.numpy() for k, v in held[0].items()}, rounds=ROUNDS):
        found[latency.name]["speedup"] = latency.speedup
    return found


def failures(found: dict[str, dict[str, float]]) -> list[str]:
    """What --check asks for and does not find."""
    bad = [f"{n}: the file is not what was simulated" for n, f in found.items() if not f["as simulated"]]
    searched, best = found["searched"], max(f["SQNR"] for n, f in found.items() if n != "searched")
    if searched["SQNR"] < max(20.0, best - NEAR):
        bad.append(f"searched {searched['SQNR']:.1f} dB, the best fixed α {best:.1f}")
    if searched["speedup"] * SLOWER < 1:
        bad.append(f"searched takes {1 / searched['speedup']:.2f} of the time of plain int8")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = figures(Path(folder))
    table = Table("MiniLM, int8", "SQNR, dB", "× plain int8", "as simulated")
    for name, f in found.items():
        table.add_row(name, f"{f['SQNR']:.2f}", f"{f['speedup']:.2f}", str(f["as simulated"]))
    Console(width=100).print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    bad = failures(found)
    for line in bad:
        print("does not hold:", line)
    return 1 if options.check and bad else 0


if __name__ == "__main__":
    sys.exit(main())
