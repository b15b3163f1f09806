"""graphq eval: what a model, and the file that was made of it, are worth on a task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from graphq.algorithms.store import apply_stored
from graphq.cli_json import emit
from graphq.errors import CalibrationError
from graphq.evaluate.taps import REFUSALS, session
from graphq.evaluate.tasks import accuracy, perplexity, similarity_correlation
from graphq.evaluate.verify import flat_outputs
from graphq.loading import load_model
from graphq.storage import load

console = Console()
Outputs = Callable[..., Tensor]


def eval_command(
    model: Annotated[str, typer.Argument(help="model.pt2, hf:DIR, or module:factory")],
    data: Annotated[str, typer.Option("--data", help="perplexity: .txt; accuracy: .npz with labels; similarity: .tsv")],
    metric: Annotated[str, typer.Option(help="perplexity, accuracy or similarity")],
    onnx: Annotated[list[Path], typer.Option("--onnx", help="Also this exported file; may be repeated")] = [],  # noqa: B006
    saved: Annotated[list[Path], typer.Option("--saved", help="Also the graph that --save has kept here")] = [],  # noqa: B006
    store: Annotated[Path | None, typer.Option(help="Also the model with the weights of this store")] = None,
    window: Annotated[int, typer.Option(help="perplexity: tokens that are read at once")] = 256,
    stride: Annotated[int, typer.Option(help="perplexity: tokens from one window to the next")] = 256,
    bos: Annotated[bool, typer.Option(help="perplexity: begin every window with the tokenizer's first token")] = False,
    samples: Annotated[int, typer.Option(help="How many samples, or windows, at most")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines")] = False,
) -> None:
    """Perplexity of a text, top-1 accuracy, or Spearman's correlation of sentence similarities with people's scores.

    Of the float model, and of what quantizing has made of it: files, saved graphs, a store. (For the SQNR of a file
    there is graphq compare.)
    """
    how = {"window": window, "stride": stride, "bos": bos} if metric == "perplexity" else {}
    measure = _measure(metric, model, Path(data), samples, window, stride, bos)
    loaded = load_model(model)
    source = loaded.module() if isinstance(loaded, torch.export.ExportedProgram) else loaded.eval()
    figures = {"float": measure(_model(source))}
    for path in saved:
        figures[str(path)] = measure(_graph(path, loaded))
    for path in onnx:
        figures[str(path)] = measure(_runtime(path))
    if store is not None:
        figures[str(store)] = measure(_model(apply_stored(store, source)))
    if as_json:
        emit({"metric": metric, **how, **figures})
        return
    table = Table("model", metric)
    for name, figure in figures.items():
        table.add_row(name, f"{figure:.4f}")
    console.print(table)
    if how:
        first = "each behind a first token" if bos else "without a first token"
        console.print(f"windows of {window} tokens, {stride} apart, {first}")


def _measure(
    metric: str, model: str, path: Path, samples: int, window: int, stride: int, bos: bool
) -> Callable[[Outputs], float]:
    if not path.is_file():
        raise CalibrationError("there is no such file", where=str(path), remedy="See graphq eval --help.")
    if metric == "accuracy":
        inputs, labels = _labelled(path, samples)
        return lambda outputs: accuracy(outputs, zip(inputs, labels, strict=True))
    if metric not in ("perplexity", "similarity"):
        raise CalibrationError(f"unknown metric {metric!r}", remedy="perplexity, accuracy or similarity.")
    if not model.startswith("hf:"):
        raise CalibrationError("text needs a tokenizer", where=str(path), remedy="Give the model as hf:DIR.")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model[3:])
    if metric == "perplexity":
        text = path.read_text(errors="ignore")
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0][: samples * stride]
        if bos and tokenizer.bos_token_id is None:
            raise CalibrationError("the tokenizer has no first token", where=model, remedy="Leave --bos out.")
        first = tokenizer.bos_token_id if bos else None
        return lambda outputs: perplexity(
            lambda part: outputs(input_ids=part), ids, window=window, stride=stride, bos=first
        )
    pairs, scores = _pairs(path, tokenizer, samples)
    return lambda outputs: similarity_correlation(lambda **given: _pooled(outputs(**given), given), pairs, scores)


def _labelled(path: Path, samples: int) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Samples one by one, by the names of a model's inputs, and the array "labels"."""
    with np.load(path) as file:
        arrays = {k: torch.from_numpy(file[k][:samples]) for k in file.files}
    if "labels" not in arrays or len(arrays) < 2:
        raise CalibrationError(
            "there are no labels, or no inputs, beside each other",
            where=str(path),
            remedy="numpy.savez(path, input=…, labels=…), named as the model names its inputs.",
        )
    labels = arrays.pop("labels")
    return [{k: a[i : i + 1] for k, a in arrays.items()} for i in range(len(labels))], list(labels.split(1))


def _pairs(path: Path, tokenizer: Any, samples: int) -> tuple[list[tuple[dict, dict]], list[float]]:
    """Lines: sentence, sentence, score, with tabs between."""
    pairs, scores = [], []
    for line in [text for text in path.read_text().splitlines() if text.strip()][:samples]:
        try:
            first, second, score = line.split("\t")
            scores.append(float(score))
        except ValueError as e:
            raise CalibrationError(
                "a line is: sentence, tab, sentence, tab, score",
                where=f"{path}: {line[:60]}",
                remedy="Mend or delete the line.",
            ) from e
        pairs.append(tuple(dict(tokenizer(s, return_tensors="pt")) for s in (first, second)))
    return pairs, scores  # type: ignore[return-value]


def _pooled(output: Tensor, given: dict[str, Tensor]) -> Tensor:
    """A vector for a sentence: the mean over its tokens, where the model gives one for each."""
    if output.ndim != 3:
        return output
    mask = given.get("attention_mask", torch.ones(output.shape[:2])).unsqueeze(-1).to(output)
    return (output * mask).sum(1) / mask.sum(1)


def _first(outputs: Any) -> Tensor:
    return flat_outputs(outputs)[0]


def _model(module: torch.nn.Module) -> Outputs:
    return lambda **given: _first(module(**given))


def _graph(path: Path, model: Any) -> Outputs:
    graph = load(path, model)
    names = [str(n.target) for n in graph.graph.find_nodes(op="placeholder")]
    return lambda **given: _first(graph(**_complete(given, names, path)))


def _complete(given: dict[str, Tensor], names: list[str], path: Path) -> dict[str, Tensor]:
    """The inputs of these names; the mask is all ones where nobody gives one."""
    known = {"attention_mask": torch.ones_like(next(iter(given.values()))), **given} if len(names) > 1 else given
    missing = [n for n in names if n not in known]
    if missing:
        raise CalibrationError(
            f"it wants {', '.join(missing)}", where=str(path), remedy=f"Name the data {', '.join(names)}."
        )
    return {n: known[n] for n in names}


def _runtime(path: Path) -> Outputs:
    """A file as a function of its inputs, by name."""
    run = session(path)
    names = [i.name for i in run.get_inputs()]

    def call(**given: Tensor) -> Tensor:
        try:
            return torch.from_numpy(run.run(None, {n: v.numpy() for n, v in _complete(given, names, path).items()})[0])
        except REFUSALS as e:
            what = f"the file does not take these inputs: {str(e).splitlines()[0][:160]}"
            raise CalibrationError(
                what, where=str(path), remedy="--window and --stride of the file's own length."
            ) from e

    return call
