"""A trained CNN to an int8 ONNX model, step by step."""

import tempfile
from pathlib import Path

from rich.console import Console

import graphq
from graphq.report.tables import comparison_table, explanation_table
from zoo import efficientnet_lite0, photo_crops, rows

console = Console()
model = efficientnet_lite0()
calibration, held_out = rows(photo_crops(16, seed=0)), rows(photo_crops(8, seed=1), 8)

prepared = graphq.prepare(model, "int8", args=(calibration[0],))  # capture, decide, place quantizers
console.print(explanation_table(graphq.explain(prepared)))  # before any data: what will happen, and why
graphq.calibrate(prepared, calibration)  # now the graph simulates the quantized model
quantized = graphq.convert(prepared)  # integer codes

with tempfile.TemporaryDirectory() as folder:
    path = graphq.export(quantized, Path(folder) / "efficientnet-int8.onnx")
    console.print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    console.print(graphq.explain(quantized, path).kernels())  # the kernels that ONNX Runtime really runs
    console.print(str(graphq.verify(quantized, path, held_out)))
console.print(comparison_table(graphq.compare(model, quantized, held_out), worst=5))
