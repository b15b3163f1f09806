"""How the time of placing quantizers grows with the model: graphq against torchao's PT2E, in one run.

    python benchmarks/prepare_scaling.py [--json out.json] [--check]

Both start from the same exported program. graphq: prepare (canonical passes, annotate, place) and convert; torchao:
prepare_pt2e and convert_pt2e with the X86InductorQuantizer. Calibration is one sample on either side and is not
counted. Conv chains of 100, 400 and 1600 layers, BERT of 12, 24 and 48 layers (hidden size 64). --check exits with 1
where a growth exponent is over 1.1, or graphq is not 10 × as fast as torchao at 400 convolutions.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import graphq

CONVS, LAYERS = (100, 400, 1600), (12, 24, 48)


def conv_chain(count: int) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """conv, batch norm, relu, over and over."""
    torch.manual_seed(0)
    blocks = [m for _ in range(count) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())]
    return nn.Sequential(*blocks).eval(), (torch.randn(1, 4, 8, 8),)


def bert(count: int) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_size=64, num_hidden_layers=count, num_attention_heads=2, intermediate_size=128,
                        vocab_size=100, max_position_embeddings=32)  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval()
    return model, (torch.randint(0, 100, (1, 16)),)


def export(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.export.ExportedProgram:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, inputs, strict=False)


def time_graphq(program: torch.export.ExportedProgram, inputs: tuple[torch.Tensor, ...]) -> float:
    gm = graphq.capture(program)
    start = time.process_time()
    prepared = graphq.prepare(gm, "int8")
    seconds = time.process_time() - start
    graphq.calibrate(prepared, [inputs], progress=False)
    start = time.process_time()
    graphq.convert(prepared)
    return seconds + time.process_time() - start


def time_torchao(program: torch.export.ExportedProgram, inputs: tuple[torch.Tensor, ...]) -> float:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    gm = program.module()
    gm.graph.eliminate_dead_code()  # it stumbles over dead branches
    start = time.process_time()
    prepared = prepare_pt2e(gm, quantizer)
    seconds = time.process_time() - start
    prepared(*inputs)
    start = time.process_time()
    convert_pt2e(prepared)
    return seconds + time.process_time() - start


def exponent(times: dict[int, float]) -> float:
    """Slope of log time over log size, by least squares."""
    x, y = [math.log(n) for n in times], [math.log(t) for t in times.values()]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    times: dict[str, dict[int, float]] = {}
    warm = conv_chain(2)
    time_graphq(export(*warm), warm[1])
    time_torchao(export(*warm), warm[1])
    for name, make, sizes in (("conv", conv_chain, CONVS), ("bert", bert, LAYERS)):
        for size in sizes:
            model, inputs = make(size)
            program = export(model, inputs)
            peers = {"graphq": time_graphq} | ({"torchao": time_torchao} if (name, size) != ("conv", 1600) else {})
            for who, measure in peers.items():
                runs = [measure(copy.copy(program), inputs) for _ in range(options.rounds)]
                times.setdefault(f"{name} {who}", {})[size] = min(runs)
    table = Table("layers", "method", "small", "middle", "large", "exponent", title="cpu seconds of prepare + convert")
    for key, rows in times.items():
        cells = [f"{n}: {t:.2f}" for n, t in rows.items()]
        table.add_row(*key.split(), *cells, *[""] * (3 - len(cells)), f"{exponent(rows):.2f}")
    Console(width=120).print(table)
    ratio = times["conv torchao"][400] / times["conv graphq"][400]
    print(f"torchao over graphq at 400 convolutions: {ratio:.1f}")
    if options.json:
        options.json.write_text(json.dumps({"seconds": times, "torchao over graphq at 400": ratio}, indent=2))
    bad = [f"{k}: exponent over 1.1" for k in ("conv graphq", "bert graphq") if exponent(times[k]) > 1.1]
    bad += ["less than 10 × torchao at 400 convolutions"] if ratio < 10 else []
    for line in bad:
        print("does not hold:", line)
    return 1 if options.check and bad else 0


if __name__ == "__main__":
    sys.exit(main())
