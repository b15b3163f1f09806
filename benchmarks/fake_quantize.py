"""What fake-quantization costs per element, against torch.fake_quantize_per_channel_affine, in one interleaved run.

    python benchmarks/fake_quantize.py [--rounds 9] [--json out.json] [--check]

A weight [4096, 4096]; medians over the rounds, as ratios. --check exits with 1 where a figure of the acceptance list
does not hold: int4 per group of 128 ≤ 1.5 ×, nvfp4 and mxfp4 ≤ 6 ×.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from graphq import QuantSpec
from graphq.numerics.affine import fake_quantize, range_of
from graphq.numerics.scales import choose_qparams

SPECS = {
    "int8 per channel": QuantSpec(granularity="channel"),
    "int4 group 128": QuantSpec(format="int4", granularity="group", group_size=128),
    "uint4 group 128": QuantSpec(format="uint4", symmetric=False, granularity="group", group_size=128),
    "fp8_e4m3 per channel": QuantSpec(format="fp8_e4m3", granularity="channel"),
    "nvfp4": QuantSpec(format="nvfp4"),
    "mxfp4": QuantSpec(format="mxfp4"),
    "mxfp6_e2m3": QuantSpec(format="mxfp6_e2m3"),
    "mx9": QuantSpec(format="mx9"),
}
LIMITS = {"int4 group 128": 1.5, "nvfp4": 6.0, "mxfp4": 6.0}


def ours(weight: torch.Tensor, spec: QuantSpec) -> Callable[[], torch.Tensor]:
    block = spec.block_for(2)
    options = {"scale": spec.scale, "mode": spec.scale_mode, "span": spec.span}
    scale, zero = choose_qparams(*range_of(weight, block), spec.number_format, symmetric=spec.symmetric, **options)
    return lambda: fake_quantize(weight, scale, zero, block, spec.number_format)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    weight = torch.randn(4096, 4096)
    scale, zero = weight.abs().amax(1) / 127, torch.zeros(4096, dtype=torch.int32)
    runs = {"torch": lambda: torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -128, 127)}
    runs |= {name: ours(weight, spec) for name, spec in SPECS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(s[1:]) for name, s in seconds.items()}
    ratios = {name: medians[name] / medians["torch"] for name in SPECS}
    table = Table("fake-quantize", "ns per element", "ratio to torch per channel")
    table.add_row("torch per channel", f"{1e9 * medians['torch'] / weight.numel():.2f}", "1.00")
    for name, ratio in ratios.items():
        table.add_row(name, f"{1e9 * medians[name] / weight.numel():.2f}", f"{ratio:.2f}")
    Console(width=100).print(table)
    if options.json:
        options.json.write_text(json.dumps({"seconds": medians, "ratios": ratios}, indent=2))
    bad = [n for n, limit in LIMITS.items() if ratios[n] > limit]
    for name in bad:
        print(f"does not hold: {name} {ratios[name]:.2f} > {LIMITS[name]}")
    return 1 if options.check and bad else 0


if __name__ == "__main__":
    sys.exit(main())
