"""graphq against onnxruntime.quantization on the same float model, samples and runtime.

    python benchmarks/vs_onnxruntime.py [--models effnet minilm resnet50] [--json out.json] [--check]

Every quantizer runs in a process of its own (for its time and peak memory); then all files are evaluated on the same
held-out samples and timed in one interleaved run. --check exits with 1 where a figure of the acceptance list fails.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import graphq
import zoo
from graphq.evaluate.compare import output_metrics
from graphq.evaluate.latency import measure
from graphq.evaluate.taps import session

CALIBRATION, EVALUATION = 64, 256


def resnet50() -> torch.nn.Module:
    """ResNet-50 of transformers with seeded weights; batch norm statistics re-estimated on photographs."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(num_labels=1000)).train()
    with torch.no_grad():
        for batch in zoo.rows(zoo.photo_crops(64, seed=7), 16):
            model(batch)
    return model.eval()


MODELS = {
    "effnet": (zoo.efficientnet_lite0, zoo.photo_crops, "batch"),
    "minilm": (zoo.minilm, zoo.sentences, "batch+sequence"),
    "resnet50": (resnet50, zoo.photo_crops, "batch"),
}
PEERS = {
    "effnet": ("static", "static reduce_range"),
    "minilm": ("static", "static reduce_range", "static MatMul only", "dynamic"),
    "resnet50": ("static", "static reduce_range"),
}


def named(inputs) -> list[dict]:
    """Samples as feeds by input name."""
    return [r if isinstance(r, dict) else {"image": r} for r in zoo.rows(inputs)]


def peak_mb() -> float:
    """Largest resident size of this process since its start (ru_maxrss would inherit the parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def forget_peak() -> None:
    """Start the peak anew from what is resident now: building the float model is not a part of quantizing it."""
    Path("/proc/self/clear_refs").write_text("5")


def forward_seconds(net: torch.nn.Module, data: list) -> float:
    """One plain pass of the float model over the calibration samples."""
    start = time.perf_counter()
    with torch.no_grad():
        for d in data:
            net(**d) if isinstance(d, dict) else net(d)
    return time.perf_counter() - start


def make_graphq(model: str, folder: Path) -> dict:
    make, samples, dynamic = MODELS[model]
    net, data = make(), zoo.rows(samples(CALIBRATION, seed=0))
    args, kwargs = ((), data[0]) if isinstance(data[0], dict) else ((data[0],), {})
    graphq.capture(torch.nn.Linear(2, 2), (torch.zeros(2, 2),))  # imports are not timed, here as for the peers
    forward_seconds(net, data)  # warm, as the peer's process is by its float model
    forget_peak()
    start = time.perf_counter()
    prepared = graphq.prepare(net, "int8", args, kwargs, dynamic_shapes=dynamic)
    graphq.calibrate(prepared, data, progress=False)
    converted = graphq.convert(prepared)
    seconds, peak = time.perf_counter() - start, peak_mb()
    calibration, forward = [], []
    for _ in range(3):
        forward.append(forward_seconds(net, data))
        prepared = graphq.prepare(net, "int8", args, kwargs, dynamic_shapes=dynamic)
        start = time.perf_counter()
        graphq.calibrate(prepared, data, progress=False)
        calibration.append(time.perf_counter() - start)
    graphq.export(converted, folder / f"{model}-graphq.onnx")
    checked = graphq.verify(converted, folder / f"{model}-graphq.onnx", zoo.rows(samples(8, seed=1), 8))
    explanation = graphq.explain(converted, folder / f"{model}-graphq.onnx")
    return {
        "seconds": seconds,
        "rss_mb": peak,
        "calibration_over_forward": statistics.median(calibration) / statistics.median(forward),
        "verify": checked.to_dict(),
        "kernel_disagreements": len(explanation.disagreements),
        "undecided": len(explanation.undecided),
        "kernels": explanation.kernels(),
    }


def make_peer(model: str, method: str, folder: Path) -> dict:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    source, out = folder / f"{model}-fp32.onnx", folder / f"{model}-{method}.onnx"
    name = session(source).get_inputs()[0].name
    feeds = named(MODELS[model][1](CALIBRATION, seed=0))

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(feeds)

        def get_next(self):
            feed = next(self.left, None)
            return feed and {(name if k == "image" else k): v.numpy() for k, v in feed.items()}

    forget_peak()
    start = time.perf_counter()
    if method == "dynamic":
        quantize_dynamic(source, out, per_channel=True)
    else:
        quantize_static(
            source, out, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, reduce_range="reduce_range" in method,
            op_types_to_quantize=["MatMul"] if "MatMul" in method else None,
        )  # fmt: skip
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "rss_mb": peak_mb()}


def in_process(*words: str) -> dict:
    """This script again with `--make`; its last line is JSON."""
    run = subprocess.run([sys.executable, __file__, "--make", *words], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{words}: {run.stderr[-2000:]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


def bench(model: str, folder: Path) -> dict[str, dict]:
    """Rows by method: cost of quantizing, quality on held-out samples, latency."""
    make, samples, dynamic = MODELS[model]
    net, held = make(), samples(EVALUATION, seed=1)
    args, kwargs = ((), {k: v[:1] for k, v in held.items()}) if isinstance(held, dict) else ((held[:1],), {})
    graphq.export(graphq.capture(net, args, kwargs, dynamic), folder / f"{model}-fp32.onnx")
    results = {"fp32": {}, "graphq": in_process(model, "graphq", str(folder))}
    results |= {peer: in_process(model, peer, str(folder)) for peer in PEERS[model]}
    batches = zoo.rows(held, 8)
    files = {method: folder / f"{model}-{method}.onnx" for method in results}
    outputs = {}
    for method, file in files.items():
        run = session(file)
        first = run.get_inputs()[0].name
        feeds = [{k: v.numpy() for k, v in (b if isinstance(b, dict) else {first: b}).items()} for b in batches]
        outputs[method] = torch.cat([torch.from_numpy(run.run(None, f)[0]) for f in feeds])
    for method in results:
        quality = output_metrics(outputs["fp32"], outputs[method])
        results[method] |= {"sqnr": quality.sqnr, "cosine": quality.cosine, "agreement": quality.agreement}
        results[method]["mb"] = files[method].stat().st_size / 1e6
    for size in (1, 8):
        inputs = zoo.rows(samples(size, seed=1), size)[0]
        first = session(files["fp32"]).get_inputs()[0].name
        feed = {k: v.numpy() for k, v in (inputs if isinstance(inputs, dict) else {first: inputs}).items()}
        for m in measure(files, feed, rounds=21):
            results[m.name] |= {f"b{size}_ms": m.median_ms, f"b{size}_min_ms": m.min_ms, f"b{size}_speedup": m.speedup}
    return results


def failures(model: str, r: dict[str, dict]) -> list[str]:
    """The lines of the acceptance list that do not hold."""
    ours, peers = r["graphq"], [r[p] for p in PEERS[model]]
    static = r["static"]
    best = max(p["sqnr"] for p in peers)
    limits = {
        "effnet": [("sqnr", 14.5), ("agreement", 0.87), ("b1_speedup", 1.3), ("b8_speedup", 1.4)],
        "minilm": [("sqnr", 16.0), ("cosine", 0.987), ("b1_speedup", 1.35), ("b8_speedup", 1.35)],
        "resnet50": [("sqnr", best + 1), ("b1_speedup", 1.7), ("b8_speedup", 1.7)],
    }[model]
    limits = [("sqnr", best), *limits]
    bad = [f"{k} {ours[k]:.3f} < {least:.3f}" for k, least in limits if ours[k] < least]
    at_most = [("seconds", static["seconds"]), ("rss_mb", static["rss_mb"]), ("calibration_over_forward", 1.5)]
    if model == "effnet":
        at_most += [(f"b{n}_ms", static[f"b{n}_ms"] * 1.05) for n in (1, 8)]
    bad += [f"{k} {ours[k]:.3f} > {most:.3f}" for k, most in at_most if ours[k] > most]
    v = ours["verify"]
    if v["share_equal"] < 0.998 or v["largest_lsb"] > 1:
        bad.append(f"verify: {v['share_equal']:.4%} equal, largest {v['largest_lsb']} LSB")
    for figure in ("output_sqnr_db", "kernels_sqnr_db", "floats_sqnr_db"):  # the last two say why the first is low
        if v[figure] < 35:
            bad.append(f"verify end to end: {figure} {v[figure]:.1f} < 35")
    if ours["kernel_disagreements"] or ours["undecided"]:
        bad.append(f"{ours['kernel_disagreements']} kernels differ from the prediction, {ours['undecided']} undecided")
    return bad


COLUMNS = {
    "SQNR dB": ("sqnr", "{:.2f}"), "cosine": ("cosine", "{:.4f}"), "agree": ("agreement", "{:.3f}"),
    "MB": ("mb", "{:.1f}"), "b1 ms": ("b1_ms", "{:.1f}"), "b1 ×": ("b1_speedup", "{:.2f}"),
    "b8 ms": ("b8_ms", "{:.1f}"), "b8 ×": ("b8_speedup", "{:.2f}"), "quantize s": ("seconds", "{:.1f}"),
    "peak MB": ("rss_mb", "{:.0f}"),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        model, method, folder = options.make
        done = make_graphq(model, Path(folder)) if method == "graphq" else make_peer(model, method, Path(folder))
        print(json.dumps(done))
        return 0
    console, results, bad = Console(width=160), {}, []
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            results[model] = bench(model, Path(folder))
        table = Table("method", *COLUMNS, title=f"{model} ({graphq.get_target('onnxruntime').cpu})")
        for method, r in results[model].items():
            table.add_row(method, *(form.format(r[k]) if k in r else "" for k, form in COLUMNS.values()))
        console.print(table)
        ours = results[model]["graphq"]
        console.print(f"calibration / float forward {ours['calibration_over_forward']:.2f}; verify {ours['verify']}")
        bad += [f"{model}: {line}" for line in failures(model, results[model])]
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))
    for line in bad:
        console.print(f"[red]does not hold[/red] {line}")
    return 1 if options.check and bad else 0


if __name__ == "__main__":
    sys.exit(main())
