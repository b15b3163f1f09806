"""Latency of files side by side: interleaved, so that a drifting machine hits all of them alike, and every round in
another order, since what ran before has left the caches and the clock to the next."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from graphq.errors import RuntimeMismatch, did_you_mean
from graphq.evaluate.inductor import compile_program, load_program
from graphq.evaluate.openvino import OpenVino
from graphq.evaluate.taps import load_model, session

ONNX_TO_NUMPY = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32,
                 "tensor(bool)": np.bool_, "tensor(double)": np.float64}  # fmt: skip
RUNTIMES = ("onnxruntime", "openvino", "torch_compile")


@dataclass
class Latency:
    """Milliseconds of one model (median and minimum), and how many times as fast as the first model it is."""

    name: str
    median_ms: float
    min_ms: float
    speedup: float


def measure(
    models: dict[str, str | Path],
    feed: dict[str, np.ndarray],
    *,
    rounds: int = 15,
    runtime: str = "onnxruntime",
) -> list[Latency]:
    """Time models on one feed, in turns, after two warm-up runs each. The first is the baseline: `speedup` is the
    median over the rounds of its time divided by the other's in the same round."""
    runs = {name: _runner(path, runtime, feed) for name, path in models.items()}
    for run in runs.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(rounds):
        order = _shuffled(order)
        for name in order:
            start = time.perf_counter()
            runs[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
    base = next(iter(times.values()))
    return [
        Latency(n, statistics.median(t), min(t), statistics.median(b / x for b, x in zip(base, t, strict=True)))
        for n, t in times.items()
    ]


def _shuffled(names: list[str]) -> list[str]:
    """In another order, which does not begin with what came last."""
    if len(names) < 2:
        return names
    first = random.choice(names[:-1])
    others = [name for name in names if name != first]
    return [first, *random.sample(others, len(others))]


def _runner(path: str | Path, runtime: str, feed: dict[str, np.ndarray]) -> Callable[[], Any]:
    if runtime == "onnxruntime":
        run = session(path)
        return lambda: run.run(None, feed)
    if runtime == "openvino":
        compiled = OpenVino(path)
        return lambda: compiled.run(feed)
    program, values = compile_program(path), [torch.from_numpy(v) for v in feed.values()]
    args, kwargs = load_program(path).example_inputs  # type: ignore[misc]
    named = dict(zip(kwargs, values[len(args) :], strict=True))
    return lambda: program(*values[: len(args)], **named)


def runtime_of(path: str | Path) -> str:
    """The runtime that a file was written for, as it says itself; ONNX Runtime for files of others. Raises
    RuntimeMismatch for files of runtimes that are not here."""
    if Path(path).suffix == ".pt2":
        return "torch_compile"
    load_model(path)
    named = {p.key: p.value for p in onnx.load(path, load_external_data=False).metadata_props}
    target = named.get("graphq.target", "onnxruntime")
    return check_runtime("onnxruntime" if target == "onnx" else target, str(path))


def check_runtime(name: str, where: str = "") -> str:
    """The name, if files can be timed in that runtime on this machine."""
    if name == "tensorrt":
        raise RuntimeMismatch(
            "TensorRT is not run from here", where=where, remedy="docs/target-tensorrt.md has the line for trtexec."
        )
    if name not in RUNTIMES:
        raise RuntimeMismatch(f"nothing is timed in {name!r}", where=where, remedy=did_you_mean(name, RUNTIMES))
    if where.endswith(".onnx") and name == "torch_compile":
        raise RuntimeMismatch("torch.compile runs .pt2 programs", where=where, remedy="Export for torch_compile.")
    return name


def random_feed(path: str | Path, *, batch: int = 1, sequence: int = 128, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs for a model: normal floats, small token ids, masks of ones. Dynamic dimensions: batch, then sequence."""
    if Path(path).suffix == ".pt2":
        return _feed_of_program(path, batch=batch, sequence=sequence)
    load_model(path)
    return random_feed_of(session(path), batch=batch, sequence=sequence, seed=seed)


def _feed_of_program(path: str | Path, *, batch: int, sequence: int) -> dict[str, np.ndarray]:
    """The inputs that a program was made with, repeated or cut along its dynamic dimensions."""
    program = load_program(path)
    args, kwargs = program.example_inputs  # type: ignore[misc]
    values = [*args, *kwargs.values()]
    inputs = [n for n in program.graph.nodes if n.name in program.graph_signature.user_inputs]
    feed = {}
    for node, value in zip(inputs, values, strict=True):
        for axis, size in enumerate(node.meta["val"].shape):
            wanted = value.shape[axis] if isinstance(size, int) else (batch if axis == 0 else sequence)
            value = value.index_select(axis, torch.arange(wanted) % value.shape[axis])
        feed[node.name] = value.numpy()
    return feed


def random_feed_of(run: Any, *, batch: int = 1, sequence: int = 128, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs for a session: see `random_feed`."""
    rng = np.random.default_rng(seed)
    feed: dict[str, np.ndarray] = {}
    for i in run.get_inputs():
        if i.type not in ONNX_TO_NUMPY:
            raise RuntimeMismatch(f"no random input for type {i.type}", where=i.name, remedy="Give real data.")
        shape = [d if isinstance(d, int) else (batch if n == 0 else sequence) for n, d in enumerate(i.shape)]
        dtype: Any = ONNX_TO_NUMPY[i.type]
        if np.issubdtype(dtype, np.floating):
            feed[i.name] = rng.standard_normal(shape).astype(dtype)
        elif "mask" in i.name:
            feed[i.name] = np.ones(shape, dtype)
        else:
            feed[i.name] = rng.integers(0, 100, shape).astype(dtype)
    return feed
