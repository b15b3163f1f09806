"""The main job on two trained models: quantize, export, measure, verify, explain. `make demo` runs it."""

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

import graphq
from graphq.evaluate.latency import measure
from graphq.evaluate.verify import db, feed_of
from graphq.report.explain import INTEGER_PREFIXES
from zoo import efficientnet_lite0, minilm, photo_crops, rows, sentences

CASES = {
    "EfficientNet-Lite0": (efficientnet_lite0, photo_crops, "batch", "int8"),
    "MiniLM-L6": (minilm, sentences, "batch+sequence", "int8_smoothquant"),
}


def run(name: str, out: Path, console: Console) -> list[str]:
    """One model; returns its row of the table."""
    make, samples, dynamic, config = CASES[name]
    model, calibration, held_out = make(), rows(samples(64, seed=0)), rows(samples(32, seed=1), 8)
    console.rule(name)
    start = time.perf_counter()
    quantized = graphq.quantize(model, config, calibration, dynamic_shapes=dynamic)
    console.print(f"quantized in {time.perf_counter() - start:.1f} s; exporting …")
    int8 = graphq.export(quantized, out / f"{name.lower()}-int8.onnx")
    fp32 = graphq.export(graphq.capture_like(model, quantized), out / f"{name.lower()}-fp32.onnx")
    quality = graphq.compare(model, quantized, held_out, per_op=False)
    checked = graphq.verify(quantized, int8, held_out[:1])
    explanation = graphq.explain(quantized, int8)
    graphq.report(quantized, out / f"{name.lower()}.html", explanation, quality, checked)
    console.print(str(checked))
    speed = []
    for batch in (1, 8):
        one = rows(samples(batch, seed=1), batch)[0]
        args, kwargs = ((), one) if isinstance(one, dict) else ((one,), {})
        speed.append(measure({"fp32": fp32, "int8": int8}, feed_of(quantized, args, kwargs))[1])
    kernels = {k: v for k, v in explanation.kernels().items() if k.startswith(INTEGER_PREFIXES)}
    size = [f"{p.stat().st_size / 1e6:.1f}" for p in (fp32, int8)]
    return [name, " → ".join(size) + " MB", *(f"{s.median_ms:.1f} ms ({s.speedup:.2f}×)" for s in speed),
            db(quality.sqnr), f"{quality.agreement:.3f}", "\n".join(f"{v} {k}" for k, v in kernels.items()),
            f"{checked.share_equal:.3%} ≤{checked.largest} LSB"]  # fmt: skip


if __name__ == "__main__":
    folder, screen = Path(sys.argv[1] if len(sys.argv) > 1 else "out"), Console(width=140)
    folder.mkdir(exist_ok=True)
    table = Table(title="int8 in ONNX Runtime, against the float model", title_justify="left")
    for column in ("model", "size", "batch 1", "batch 8", "SQNR", "agreement", "integer kernels", "verified"):
        table.add_column(column)
    for case in CASES:
        table.add_row(*run(case, folder, screen))
    screen.print(table)
    screen.print(f"ONNX files and reports: {folder}/")
