"""What a model is worth on a task: perplexity, accuracy, correlation. Each takes a function, a model's forward or a
runtime's, and says in its name and arguments how it counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphq.errors import CalibrationError

NO_DATA = "Give data with at least one sample."


@torch.no_grad()
def perplexity(
    logits_of: Callable[[Tensor], Tensor], ids: Tensor, *, window: int = 256, stride: int = 256, bos: int | None = None
) -> float:
    """Perplexity of a text, token by token.

    logits_of: tokens [1, length] → logits [1, length, vocabulary]. ids: the tokens of the whole text [length]. It is
    read in windows, `stride` tokens apart; a token is predicted once, from those before it in the first window that has
    some (a stride smaller than the window gives each more to go by, and costs more). bos: a token to begin every window
    with, if any. What is left at the end and is no whole window counts too.
    """
    if ids.ndim != 1 or len(ids) < 2 or not 0 < stride <= window or window < 2:
        raise CalibrationError(
            f"a text of {list(ids.shape)} tokens in windows of {window}, {stride} apart",
            remedy="ids [length] of two tokens or more, 0 < stride ≤ window.",
        )
    lost, counted, done = 0.0, 0, 1 if bos is None else 0  # tokens before `done` have been predicted
    for start in range(0, len(ids), stride):
        part = ids[start : start + window]
        given = part if bos is None else torch.cat([part.new_tensor([bos]), part])
        first = max(done - start, 1 if bos is None else 0)  # of the window's own tokens
        if first >= len(part):
            break
        logits = torch.as_tensor(logits_of(given[None]))[0].float()
        wanted = given[1:].to(logits.device)
        skip = first - 1 if bos is None else first
        lost += torch.nn.functional.cross_entropy(logits[:-1][skip:], wanted[skip:], reduction="sum").item()
        counted += len(wanted) - skip
        done = start + len(part)
        if done >= len(ids):
            break
    return math.exp(lost / counted)


@torch.no_grad()
def accuracy(outputs_of: Callable[..., Any], data: Iterable[tuple[Any, Tensor]], *, top: int = 1) -> float:
    """Share of samples whose label is among the `top` largest outputs. data: (inputs, labels [n]) batches; inputs are a
    tensor, a tuple or a dict; outputs are [n, classes]."""
    right = count = 0
    for inputs, labels in data:
        logits = torch.as_tensor(_first(_call(outputs_of, inputs)))
        found = logits.topk(top, -1).indices == labels.reshape(-1, 1).to(logits.device)
        right, count = right + int(found.any(-1).sum()), count + len(labels)
    if not count:
        raise CalibrationError("there is nothing to be right about", remedy=NO_DATA)
    return right / count


@torch.no_grad()
def similarity_correlation(
    embeddings_of: Callable[..., Any], pairs: Iterable[tuple[Any, Any]], scores: Sequence[float]
) -> float:
    """Spearman's correlation of cosine similarities with people's scores, as of the STS benchmarks.

    pairs: inputs of the two sides, in batches or one by one. embeddings_of: inputs → [n, features].
    """
    found: list[float] = []
    for a, b in pairs:
        left, right = (torch.as_tensor(_first(_call(embeddings_of, x))).flatten(1).double() for x in (a, b))
        found += torch.nn.functional.cosine_similarity(left, right, dim=-1).tolist()
    if len(found) != len(scores) or len(found) < 2:
        raise CalibrationError(
            f"{len(found)} pairs and {len(scores)} scores", remedy="A score for each of two or more."
        )
    x, y = (_ranks(torch.tensor(v, dtype=torch.float64)) for v in (found, list(scores)))
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x.norm() * y.norm()))


def _ranks(values: Tensor) -> Tensor:
    """Places in order, equal values sharing the mean of theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[inverse]


def _call(function: Callable[..., Any], inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return function(**inputs)
    return function(*inputs) if isinstance(inputs, (tuple, list)) else function(inputs)


def _first(outputs: Any) -> Any:
    while isinstance(outputs, (tuple, list)):
        outputs = outputs[0]
    return next(iter(outputs.values())) if isinstance(outputs, dict) else outputs
