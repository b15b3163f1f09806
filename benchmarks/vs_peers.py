"""Quality and latency in ONNX Runtime, against the quantizers whose ONNX files it runs.

    python -m venv peers && peers/bin/pip install torch onnx onnxruntime onnxscript nncf 'nvidia-modelopt[onnx]'
    python benchmarks/vs_peers.py --peers peers/bin/python [--models effnet minilm resnet50 vit] [--json FILE] [--check]

Every quantizer gets the same float file (ours the model it was made of) and the same calibration samples; quality is
measured on held-out samples, latencies in turns in one run. Peers that fail are reported with their last line. Methods
are compared within their kind: int8 layers, and 4-bit weights beside float inputs.

--check exits with 1 unless, for every model and kind, the better of our files is as fast as the fastest peer (× 1.02)
and has more SQNR than every peer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import graphq
import zoo
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.evaluate.compare import output_metrics
from graphq.evaluate.latency import measure
from graphq.evaluate.taps import session
from kernels import vit
from vs_onnxruntime import MODELS as TRAINED

CALIBRATION, EVALUATION, SLOWER, ROUNDS = 32, 64, 1.02, 41
MODELS = {**TRAINED, "vit": (vit, zoo.photo_crops, "batch")}
INT4 = QuantSpec(format="uint4", symmetric=False, granularity="group", group_size=32, observer="mse_grid")
LINEARS_INT4 = QuantConfig(name="int4 linears", rules=(Rule(select="linear", scheme=Scheme(weight=INT4)),))
KINDS = {
    "int8": (
        {
            "graphq int8": "int8",
            "graphq int8_smoothquant": "int8_smoothquant",
            "graphq int8_dynamic": "int8_dynamic",
            "graphq int8_dynamic_token": "int8_dynamic_token",
        },
        ("ORT static u8s8", "ORT static u8u8", "ORT dynamic", "NNCF", "ModelOpt"),
    ),
    "4-bit weights": ({"graphq int4": LINEARS_INT4}, ("ORT MatMulNBits",)),
}
TRANSFORMERS = ("minilm", "vit")


def kinds_of(model: str) -> dict[str, tuple[dict, tuple[str, ...]]]:
    """Dynamic scales and 4-bit weights are for linears."""
    if model in TRANSFORMERS:
        return KINDS
    ours, peers = KINDS["int8"]
    return {"int8": ({k: v for k, v in ours.items() if v == "int8"}, tuple(p for p in peers if p != "ORT dynamic"))}


def make_files(model: str, python: str, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """(file by method, last line by peer that failed)."""
    make, samples, dynamic = MODELS[model]
    net, given = make(), samples(CALIBRATION, seed=0)
    rows = zoo.rows(given)
    args, kwargs = ((), rows[0]) if isinstance(rows[0], dict) else ((rows[0],), {})
    files = {"fp32": graphq.export(graphq.capture(net, args, kwargs, dynamic), folder / "fp32.onnx")}
    failed = {}
    name = session(files["fp32"]).get_inputs()[0].name
    arrays = {k: v.numpy() for k, v in given.items()} if isinstance(given, dict) else {name: given.numpy()}
    np.savez(folder / "calibration.npz", **arrays)
    for ours, peers in kinds_of(model).values():
        for method, config in ours.items():
            graph = graphq.quantize(net, config, rows, dynamic_shapes=dynamic, progress=False)
            files[method] = graphq.export(graph, folder / f"{method}.onnx")
        for method in peers:
            out = folder / f"{method}.onnx"
            words = [python, str(Path(__file__).parent / "peers_onnx.py"), method, str(files["fp32"])]
            run = subprocess.run([*words, str(folder / "calibration.npz"), str(out)], capture_output=True, text=True)
            if run.returncode or not out.exists():
                failed[method] = (run.stderr.strip().splitlines() or ["no output"])[-1]
            else:
                files[method] = out
    return files, failed


def bench(model: str, python: str, folder: Path) -> tuple[dict[str, dict], dict[str, str]]:
    """Figures by method."""
    files, failed = make_files(model, python, folder)
    samples = MODELS[model][1]
    held = zoo.rows(samples(EVALUATION, seed=1), 8)
    outputs = {}
    for method, file in files.items():
        run = session(file)
        first = run.get_inputs()[0].name
        given = [{k: v.numpy() for k, v in (b if isinstance(b, dict) else {first: b}).items()} for b in held]
        outputs[method] = torch.cat([torch.from_numpy(run.run(None, f)[0]) for f in given])
    figures = {}
    for method in files:
        quality = output_metrics(outputs["fp32"], outputs[method])
        figures[method] = {"sqnr": quality.sqnr, "mb": files[method].stat().st_size / 1e6}
    for size in (1, 8):
        for m in measure(files, dict(zip(given[0], [v[:size] for v in given[0].values()], strict=True)), rounds=ROUNDS):
            figures[m.name][f"b{size}_speedup"] = m.speedup
    return figures, failed


def failures(model: str, figures: dict[str, dict]) -> list[str]:
    """What --check asks for and does not find."""
    bad = []
    for kind, (ours, peers) in kinds_of(model).items():
        mine = {k: figures[k] for k in ours}
        theirs = {k: figures[k] for k in peers if k in figures}
        if not theirs:
            bad.append(f"{model}, {kind}: no peer ran")
            continue
        best = max(p["sqnr"] for p in theirs.values())
        for size in (1, 8):
            key = f"b{size}_speedup"
            fastest = max(p[key] for p in theirs.values())
            if not any(m["sqnr"] > best and m[key] * SLOWER >= fastest for m in mine.values()):
                found = ", ".join(f"{n} {m['sqnr']:.1f} dB {m[key]:.2f} ×" for n, m in mine.items())
                bad.append(f"{model}, {kind}, batch {size}: {found}; peers up to {best:.1f} dB, {fastest:.2f} ×")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", required=True, help="python of the environment of the peers")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    console, results, bad = Console(width=120), {}, []
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            results[model], failed = bench(model, options.peers, Path(folder))
        table = Table("method", "SQNR dB", "MB", "batch 1 ×", "batch 8 ×", title=f"{model}, {zoo_cpu()}")
        for method, r in results[model].items():
            table.add_row(method, *(f"{r[k]:.2f}" for k in ("sqnr", "mb", "b1_speedup", "b8_speedup")))
        console.print(table)
        for method, line in failed.items():
            console.print(f"{method} failed: {line}", markup=False)
        bad += failures(model, results[model])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))
    for line in bad:
        console.print(f"does not hold: {line}")
    return 1 if options.check and bad else 0


def zoo_cpu() -> str:
    return f"kernels for {graphq.get_target('onnxruntime').cpu}"


if __name__ == "__main__":
    sys.exit(main())
