"""Latency of ONNX models side by side: interleaved, so that a drifting machine hits all of them alike."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphq.errors import RuntimeMismatch
from graphq.evaluate.taps import load_model, session

ONNX_TO_NUMPY = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32,
                 "tensor(bool)": np.bool_, "tensor(double)": np.float64}  # fmt: skip


@dataclass
class Latency:
    """Milliseconds of one model (median and minimum), and how many times as fast as the first model it is."""

    name: str
    median_ms: float
    min_ms: float
    speedup: float


def measure(
    models: dict[str, str | Path], feed: dict[str, np.ndarray], *, rounds: int = 15, threads: int = 0
) -> list[Latency]:
    """Time models on one feed, in turn, after two warm-up runs each. The first is the baseline: `speedup` is the
    median over the rounds of its time divided by the other's in the same round."""
    sessions = {name: session(path, threads=threads) for name, path in models.items()}
    for s in sessions.values():
        s.run(None, feed)
        s.run(None, feed)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, s in sessions.items():
            start = time.perf_counter()
            s.run(None, feed)
            times[name].append((time.perf_counter() - start) * 1e3)
    base = next(iter(times.values()))
    return [
        Latency(n, statistics.median(t), min(t), statistics.median(b / x for b, x in zip(base, t, strict=True)))
        for n, t in times.items()
    ]


def random_feed(path: str | Path, *, batch: int = 1, sequence: int = 128, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs for a model: normal floats, small token ids, masks of ones. Dynamic dimensions: batch, then sequence."""
    load_model(path)
    return random_feed_of(session(path), batch=batch, sequence=sequence, seed=seed)


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
