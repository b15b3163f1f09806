"""Perplexity, accuracy and correlation are what their definitions say."""

import math

import numpy as np
import pytest
import torch

from graphq.errors import CalibrationError
from graphq.evaluate.tasks import accuracy, perplexity, similarity_correlation

VOCABULARY = 11


def chances(given):
    """A model whose next token depends on the last one and on how many it has seen."""
    length = given.shape[1]
    generator = torch.Generator().manual_seed(5)
    table = torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    return table[given] * (1 + 0.1 * torch.arange(length))[None, :, None]


def by_hand(ids, window, stride, bos):
    """Each token from those before it in the first window that has it and something before it."""
    lost = []
    for at in range(len(ids)):
        for start in range(0, len(ids), stride):
            before = ids[start:at] if start <= at < start + window else None
            if before is not None and (len(before) or bos is not None):
                given = torch.tensor([*([bos] if bos is not None else []), *before.tolist()])
                probabilities = chances(given[None])[0, -1].double().softmax(-1)
                lost.append(-math.log(probabilities[ids[at]]))
                break
    return math.exp(sum(lost) / len(lost)), len(lost)


@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (50, 50), (7, 7)])
def test_every_token_is_predicted_once_from_what_its_window_has_before_it(window, stride, bos):
    ids = torch.randint(0, VOCABULARY, (29,), generator=torch.Generator().manual_seed(1))
    wanted, count = by_hand(ids, window, stride, bos)
    assert math.isclose(perplexity(chances, ids, window=window, stride=stride, bos=bos), wanted, rel_tol=1e-5)
    assert count == 29 if bos is not None else count <= 28


def test_accuracy_counts_labels_among_the_largest():
    logits = torch.tensor([[0.1, 0.9, 0.5], [2.0, 1.0, 1.5], [0.0, 0.2, 0.1]])
    data = [(logits[:2], torch.tensor([1, 2])), (logits[2:], torch.tensor([0]))]
    assert accuracy(lambda x: (x,), data) == pytest.approx(1 / 3)
    assert accuracy(lambda x: {"logits": x}, data, top=2) == pytest.approx(2 / 3)


def test_correlation_is_that_of_ranks_with_ties():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 30, 5))
    scores = generator.integers(0, 4, 30).astype(float)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

    def ranks(v):
        return np.array([(v < x).sum() + ((v == x).sum() + 1) / 2 for x in v])

    wanted = np.corrcoef(ranks(cosines), ranks(scores))[0, 1]
    pairs = [(torch.from_numpy(a[:10]), torch.from_numpy(b[:10])), (torch.from_numpy(a[10:]), torch.from_numpy(b[10:]))]
    assert similarity_correlation(lambda x: x, pairs, scores) == pytest.approx(wanted, abs=1e-12)


def test_data_that_say_nothing_are_refused():
    for call in (
        lambda: perplexity(chances, torch.tensor([1])),
        lambda: perplexity(chances, torch.arange(9), window=4, stride=5),
        lambda: accuracy(lambda x: x, []),
        lambda: similarity_correlation(lambda x: x, [], []),
    ):
        with pytest.raises(CalibrationError):
            call()
