"""EfficientNet-Lite0 with 4-bit weights and 8-bit activations: what weight algorithms bring back, in ONNX Runtime.

    python benchmarks/w4a8.py [--methods "RTN" "GPTQ + QEP" …] [--json FILE] [--check]

Weights are int4 with a scale per output channel, activations uint8; 64 photographs for calibration, 48 others for SQNR
and top-1 agreement with the float model, both of the exported file as ONNX Runtime computes it. "int8" is the preset.

--check exits with 1 unless every file computes what was simulated, int8 has 19 dB or more, and the best W4A8 is 12 dB
above rounding to the nearest.
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
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.evaluate.compare import OutputMetrics
from graphq.evaluate.taps import session

CALIBRATION, HELD = 64, 48
ACTIVATION = QuantSpec(format="uint8", symmetric=False, observer="mse")
QEP = {"qep": 0.5}
METHODS = {  # name → (observer of the weights, bias correction, algorithms)
    "RTN": ("minmax", False, []),
    "MSE + bias correction": ("mse_grid", True, []),
    "GPTQ + bias correction": ("mse_grid", True, ["gptq"]),
    "GPTQ + QEP": ("mse_grid", True, [{"name": "gptq", "args": QEP}]),
    "… ranges weighted by inputs": ("imatrix_mse", True, [{"name": "gptq", "args": QEP}]),
    "… equalized first": ("imatrix_mse", True, ["equalization", {"name": "gptq", "args": QEP}]),
    "AdaRound + QEP": ("mse_grid", True, [{"name": "adaround", "args": QEP}]),
}


def config(method: str) -> QuantConfig:
    observer, correct, algorithms = METHODS[method]
    weight = QuantSpec(format="int4", granularity="channel", observer=observer)
    rules = (Rule(select="*", scheme=Scheme(weight=weight, input=ACTIVATION)),)
    return QuantConfig(name="w4a8", rules=rules, bias_correction=correct, algorithms=algorithms)


def measure(
    model: torch.nn.Module, settings: QuantConfig | str, data: list, held: list, path: Path
) -> dict[str, float]:
    graph = graphq.quantize(model, settings, data, progress=False)
    graphq.export(graph, path)
    result, metrics, run = graphq.verify(graph, path, held[:2]), OutputMetrics(), session(path)
    name = run.get_inputs()[0].name
    with torch.no_grad():
        for x in held:
            metrics.add([model(x)], [torch.from_numpy(run.run(None, {name: x.numpy()})[0])])
    quality = metrics.result()
    return {"SQNR": quality.sqnr, "agreement": quality.agreement, "as simulated": result.agrees,
            "MB": path.stat().st_size / 1e6}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    model = zoo.efficientnet_lite0()
    data, held = list(zoo.photo_crops(CALIBRATION, 0).split(4)), list(zoo.photo_crops(HELD, 1).split(8))
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "m.onnx"
        figures["int8"] = measure(model, "int8", data, held, path)
        for method in options.methods:
            figures[method] = measure(model, config(method), data, held, path)
            print(method, figures[method], flush=True)
    table = Table("weights", "SQNR, dB", "agreement", "as simulated", "MB")
    for name, f in figures.items():
        table.add_row(name, f"{f['SQNR']:.1f}", f"{f['agreement']:.2f}", str(f["as simulated"]), f"{f['MB']:.1f}")
    Console(width=110).print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    bad = [f"{n}: the file is not what was simulated" for n, f in figures.items() if not f["as simulated"]]
    if figures["int8"]["SQNR"] < 19:
        bad.append(f"int8 has {figures['int8']['SQNR']:.1f} dB")
    best = max(figures[m]["SQNR"] for m in options.methods)
    if "RTN" in options.methods and best < figures["RTN"]["SQNR"] + 12:
        bad.append(f"W4A8 {best:.1f} dB, to the nearest {figures['RTN']['SQNR']:.1f}")
    for line in bad:
        print("does not hold:", line)
    return 1 if options.check and bad else 0


if __name__ == "__main__":
    sys.exit(main())
