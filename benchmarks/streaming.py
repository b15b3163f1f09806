"""GPTQ of a model that is larger than memory: peak of resident memory, its growth with depth, and a killed run.

    python benchmarks/streaming.py [--layers 64] [--folder DIR] [--json FILE] [--check]

A Llama with random weights, written as bf16 shards of one layer each; 4 samples of 128 tokens; every run is a process
of its own, whose peak of resident memory the kernel tells. The killed run gets SIGKILL when half of its weights are
chosen; its folder is then finished by another run and compared, file by file, with that of a run left alone.

--check exits with 1 unless a model of 8 GB or more needs 4 GB or less, 48 layers need no more than 1.1 × what 12
need, and the killed run ends with the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from weight_only import Logits

LARGE = {"hidden_size": 3072, "intermediate_size": 4096, "num_attention_heads": 24, "num_key_value_heads": 8}
SMALL = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 4}
DEPTHS, SAMPLES, TOKENS, VOCABULARY = (12, 24, 48), 4, 128, 8192
GB = 10**9
SPEC = QuantSpec(format="int4", granularity="group", group_size=64)
CONFIG = QuantConfig(
    rules=(Rule(select="linear", scheme=Scheme(weight=SPEC)), Rule(select="*lm_head", reason="the head")),
    algorithms=("gptq",),  # type: ignore[arg-type]
)


def llama(shape: dict[str, int], layers: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, vocab_size=VOCABULARY, num_hidden_layers=layers, attn_implementation="sdpa")
    return LlamaForCausalLM(config)


def write(folder: Path, shape: dict[str, int], layers: int) -> int:
    """Random weights as shards of one layer each; bytes on disk."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        parameters = {n: p.shape for n, p in llama(shape, layers).named_parameters()}
    shards: dict[str, list[str]] = {}
    for name in parameters:
        part = ".".join(name.split(".")[:3]) if ".layers." in name else name
        shards.setdefault(part, []).append(name)
    index, generator = {}, torch.Generator().manual_seed(0)
    for part, names in shards.items():
        tensors = {}
        for name in names:
            size = parameters[name]
            values = torch.randn(size, generator=generator) * size[-1] ** -0.5 if len(size) > 1 else torch.ones(size)
            tensors[name] = values.bfloat16()
        file = f"{part}.safetensors"
        save_file(tensors, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(p.stat().st_size for p in folder.iterdir())


def quantize(folder: Path, store: Path, shape: dict[str, int], layers: int) -> None:
    """What a child process does."""
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(1)
    data = [torch.randint(0, VOCABULARY, (1, TOKENS), generator=generator) for _ in range(SAMPLES)]
    model = Logits(graphq.from_disk(lambda: llama(shape, layers), folder))
    prepared = graphq.prepare(model, CONFIG, (data[0],), target="simulation", dynamic_shapes=None)
    graphq.calibrate(prepared, data, progress=False, store=store)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "seconds": time.perf_counter() - start, "weights": len(weights(store))}))


def child(folder: Path, store: Path, shape: str, layers: int) -> list[str]:
    return [sys.executable, __file__, "--child", str(folder), str(store), shape, str(layers)]


def run(folder: Path, store: Path, shape: str, layers: int) -> dict[str, float]:
    done = subprocess.run(child(folder, store, shape, layers), check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def killed(folder: Path, store: Path, shape: str, layers: int, after: int) -> int:
    """Start a run and kill it when so many weights are chosen; how many there were."""
    process = subprocess.Popen(child(folder, store, shape, layers), stdout=subprocess.DEVNULL)
    while process.poll() is None and len(weights(store)) < after:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return len(weights(store))


def weights(store: Path) -> dict[str, str]:
    """File → hash of its tensors: the metadata tell the seconds, which differ."""
    found = {}
    for path in sorted(store.glob("*.weight.safetensors")):
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        found[path.name] = hashlib.sha256(content[header:]).hexdigest()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=64, help="of the large model")
    parser.add_argument("--folder", type=Path, help="for the models, about 10 GB")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, store, shape, layers = options.child
        quantize(Path(folder), Path(store), {"large": LARGE, "small": SMALL}[shape], int(layers))
        return 0
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        for depth in DEPTHS:
            model = Path(scratch) / f"small{depth}"
            size = write(model, SMALL, depth)
            figures[f"{depth} layers of 768"] = {"bytes": size, **run(model, model / "store", "small", depth)}
        count = len(weights(model / "store"))
        first = killed(model, model / "again", "small", depth, count // 2)
        resumed = {"killed after": first, **run(model, model / "again", "small", depth)}
        resumed["equal"] = weights(model / "store") == weights(model / "again")
        figures["killed and resumed"] = resumed
        model = Path(scratch) / "large"
        size = write(model, LARGE, options.layers)
        figures[f"{options.layers} layers of 3072"] = {
            "bytes": size,
            **run(model, model / "store", "large", options.layers),
        }
    table = Table("run", "bf16 on disk, GB", "peak, GB", "weights", "seconds")
    for name, f in figures.items():
        disk = f"{f['bytes'] / GB:.2f}" if "bytes" in f else ""
        table.add_row(name, disk, f"{f['peak'] / GB:.2f}", f"{f['weights']}", f"{f['seconds']:.0f}")
    Console(width=110).print(table)
    print("the killed run ends with the same bytes:", resumed["equal"], f"({first} of {count} were chosen before)")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    bad = failures(figures, f"{options.layers} layers of 3072")
    for line in bad:
        print("does not hold:", line)
    return 1 if options.check and bad else 0


def failures(figures: dict[str, dict[str, float]], large: str) -> list[str]:
    bad = []
    if figures[large]["bytes"] < 8 * GB:
        bad.append(f"the model has {figures[large]['bytes'] / GB:.2f} GB only")
    if figures[large]["peak"] > 4 * GB:
        bad.append(f"it took {figures[large]['peak'] / GB:.2f} GB")
    few, many = (figures[f"{d} layers of 768"]["peak"] for d in (DEPTHS[0], DEPTHS[-1]))
    if many > 1.1 * few:
        bad.append(f"{DEPTHS[-1]} layers take {many / GB:.2f} GB, {DEPTHS[0]} take {few / GB:.2f}")
    if not figures["killed and resumed"]["equal"]:
        bad.append("the killed run ends with other bytes")
    return bad


if __name__ == "__main__":
    sys.exit(main())
