"""save and load: a prepared, calibrated, training or converted graph in a folder, as safetensors and JSON.

What is kept is what cannot be computed again: scales, codes, trained and corrected tensors, the config, the target and
the example inputs. The graph itself is made again from the model, and must come out the same, op by op; then all its
tensors are those of the file. There is no pickle in it, and a changed byte is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from graphq.algorithms.base import RESCALED
from graphq.algorithms.results import RESULTS, WeightResult
from graphq.algorithms.scaling import SMOOTHED, place_scales
from graphq.api import STAGE, Model, convert, prepare, stage_of
from graphq.config import QuantConfig
from graphq.errors import ExportError, LoadError, StateError
from graphq.graph.capture import Example, example_of
from graphq.graph.decision import decision_of
from graphq.graph.on_disk import on_disk
from graphq.graph.passes import Pipeline
from graphq.graph.several import expect_one
from graphq.graph.view import set_parameter
from graphq.passes.placement import round_states
from graphq.passes.targets import Target, get_target
from graphq.qat import FOLDED, TRAINED, make_trainable, own_tensors, qat
from graphq.quantizer import TensorQuantizer, quantizers

VERSION = 2
ABOUT, TENSORS = "graphq.json", "tensors.safetensors"
EXAMPLE = "example."  # prefix of the example inputs among the tensors


def save(graph: fx.GraphModule, folder: str | Path) -> Path:
    """Write a prepared, calibrated, training or converted graph; all of it or nothing.

    Raises StateError for other graphs, ExportError where the folder cannot be written.
    """
    expect_one(graph, "save")
    folder = Path(folder)
    if stage_of(graph) not in ("prepared", "calibrated", "converted") or FOLDED in graph.meta:
        raise StateError(
            "only prepared, calibrated, training and converted graphs are saved",
            remedy="Of a captured model save the model; of folded weights the graph that was folded.",
        )
    if any(on_disk(t) for t in _tensors(graph).values()):
        raise StateError(
            "its weights are on disk already", remedy="Keep the store of calibrate, or save the converted graph."
        )
    if any(q.observer is not None for q in quantizers(graph).values()):
        raise StateError("observers are running", remedy="graphq.qat.observers(graph, on=False), then save.")
    if folder.exists() and not (folder / ABOUT).exists() and any(folder.iterdir()):
        raise ExportError("this folder holds something else", where=str(folder), remedy="Choose an empty or new one.")
    example, inputs = _example_to_json(example_of(graph))
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in _tensors(graph).items()} | inputs
    target: Target = graph.meta["graphq_target"]
    about = {
        "graphq": VERSION,
        "torch": torch.__version__,
        "stage": stage_of(graph),
        "config": json.loads(graph.meta["graphq_config"].model_dump_json()),
        "target": {"name": target.name, "options": dict(target.options)},
        "canonical": [p.name for p in graph.meta["graphq_canonical"].passes],
        "trained": graph.meta.get(TRAINED),
        "smoothed": graph.meta.get(SMOOTHED, []),
        "rescaled": graph.meta.get(RESCALED, []),
        "weights": [r.to_dict() for r in graph.meta.get(RESULTS, [])],
        "clip": all(q.clip for q in quantizers(graph).values()),
        "example": example,
        "graph": _fingerprint(graph),
        "reads": _reads(graph),
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            part = Path(temporary) / "new"
            part.mkdir()
            save_file(tensors, part / TENSORS)
            about["sha256"] = {"tensors": _sha256((part / TENSORS).read_bytes()), "about": _sha256(_text(about))}
            (part / ABOUT).write_text(json.dumps(about, indent=1))
            if folder.exists():
                os.replace(folder, Path(temporary) / "old")
            os.replace(part, folder)
    except OSError as e:
        raise ExportError(
            f"the graph could not be written: {e.strerror or e}",
            where=str(folder),
            remedy="Free space, or another path.",
        ) from e
    return folder


def load(folder: str | Path, model: Model, *, canonical: Pipeline | None = None) -> fx.GraphModule:
    """The graph that `save` has written, from the model that it was made of.

    canonical: the pipeline that `prepare` was given, where it was another than the built-in one. Raises LoadError for a
    folder that is incomplete, changed, of another version, or of another model.
    """
    folder = Path(folder)
    about, tensors = _read(folder)
    tensors = {k: v.to(_device(model)) for k, v in tensors.items()}
    example = _example_from_json(about["example"], tensors)
    target = get_target(about["target"]["name"], **about["target"]["options"])
    config = QuantConfig(**about["config"])
    gm = prepare(
        model, config, example.args, example.kwargs, target=target, dynamic_shapes=example.dynamic_shapes,
        canonical=canonical,
    )  # fmt: skip
    passes = [p.name for p in gm.meta["graphq_canonical"].passes]
    if passes != about["canonical"]:
        raise LoadError(
            f"it was prepared by the passes {' → '.join(about['canonical'])}",
            where=str(folder),
            remedy="Give the pipeline: graphq.load(folder, model, canonical=…).",
        )
    gm = _at_stage(gm, about, tensors)
    if _fingerprint(gm) != about["graph"]:
        made_by = "" if about["torch"] == torch.__version__ else f" (torch {about['torch']}, here {torch.__version__})"
        raise LoadError(
            f"the model does not give the graph that was saved{made_by}",
            where=_first_difference(gm, about["graph"]),
            remedy="Load it with the model, and the versions, that it was prepared from.",
        )
    _point_reads(gm, about["reads"], tensors)
    if TRAINED in gm.meta:
        make_trainable(gm)
    _fill(gm, tensors, folder)
    gm.meta[RESCALED] = about.get("rescaled", gm.meta.get(RESCALED, []))
    gm.meta[RESULTS] = [WeightResult(**r) for r in about.get("weights", [])]
    gm.recompile()
    return gm


def _device(model: Model) -> torch.device:
    """Where the model's tensors are."""
    state = model.state_dict if isinstance(model, ExportedProgram) else model.state_dict()
    return next((v.device for v in state.values() if isinstance(v, Tensor)), torch.device("cpu"))


def _at_stage(gm: fx.GraphModule, about: dict[str, Any], tensors: dict[str, Tensor]) -> fx.GraphModule:
    """Bring a prepared graph to the stage that was saved; values are filled in afterwards."""
    place_scales(gm, about.get("smoothed", []))
    if about["stage"] == "prepared":
        return gm
    gm = own_tensors(gm)
    for name, quantizer in quantizers(gm).items():
        _restore(quantizer, name, tensors)
    round_states(gm)
    gm.meta[STAGE] = "calibrated"
    if about["trained"] is not None:
        gm = qat(gm, about["trained"], clip=about["clip"])
    if about["stage"] == "converted":
        gm = convert(gm)
    return gm


def _restore(quantizer: TensorQuantizer, name: str, tensors: dict[str, Tensor]) -> None:
    """Scale and zero point of one quantizer. In a converted graph one that follows another has a name of its own."""
    for leaf in ("scale", "zero_point", "overall"):
        value = tensors.get(f"{name}.{leaf}")
        quantizer.register_buffer(leaf, None if value is None else value.clone())
    quantizer.state = "quantize"
    if quantizer.then is not None:
        _restore(quantizer.then, f"{name}.then" if f"{name}.then.scale" in tensors else f"{name}_then", tensors)


def _tensors(gm: fx.GraphModule) -> dict[str, Tensor]:
    """Every parameter and buffer by name; a tensor with two names comes twice."""
    found = [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]
    return {k: v for k, v in found if v is not None}


def _fill(gm: fx.GraphModule, tensors: dict[str, Tensor], folder: Path) -> None:
    """Put the saved values into the graph's own tensors."""
    wanted = {k: v for k, v in tensors.items() if not k.startswith(EXAMPLE)}
    mine = _tensors(gm)
    wrong = sorted(set(wanted) ^ set(mine)) or sorted(k for k, v in wanted.items() if v.shape != mine[k].shape)
    if wrong:
        raise LoadError(
            f"the tensor {wrong[0]!r} is not the one that the graph has",
            where=str(folder / TENSORS),
            remedy="Load it with the model that it was prepared from.",
        )
    for name, value in wanted.items():
        path, _, leaf = name.rpartition(".")
        owner = gm.get_submodule(path)
        own = getattr(owner, leaf)
        value = value.to(own.device)
        if isinstance(own, nn.Parameter):
            setattr(owner, leaf, nn.Parameter(value, requires_grad=own.requires_grad))
        else:
            owner.register_buffer(leaf, value)


def _fingerprint(gm: fx.GraphModule) -> list[str]:
    """A line per op: what it is and what it reads, apart from tensors that calibration replaces."""
    lines = []
    for node in gm.graph.nodes:
        if node.op in ("get_attr", "output"):
            continue
        inputs = ", ".join("·" if a.op == "get_attr" else a.name for a in node.all_input_nodes)
        lines.append(f"{node.name} = {node.target}({inputs})")
    return lines


def _first_difference(gm: fx.GraphModule, saved: list[str]) -> str:
    for mine, theirs in zip(_fingerprint(gm), saved, strict=False):
        if mine != theirs:
            return f"{mine}, saved was {theirs}"
    return f"{len(_fingerprint(gm))} ops, saved were {len(saved)}"


def _reads(gm: fx.GraphModule) -> dict[str, list[str]]:
    """op → the names of the tensors of the graph that it reads, in order."""
    reads = {n.name: [str(a.target) for a in n.all_input_nodes if a.op == "get_attr"] for n in gm.graph.nodes}
    return {k: v for k, v in reads.items() if v}


def _point_reads(gm: fx.GraphModule, reads: dict[str, list[str]], tensors: dict[str, Tensor]) -> None:
    """Let ops read the tensors that they read when saved: calibration has corrected biases and guarded weights."""
    for node in list(gm.graph.nodes):
        mine = [a for a in node.all_input_nodes if a.op == "get_attr"]
        for old, name in zip(mine, reads.get(node.name, ()), strict=True):
            if str(old.target) == name:
                continue
            if name not in _tensors(gm):
                set_parameter(gm, name, tensors[name].clone())
            with gm.graph.inserting_before(node):
                new = gm.graph.get_attr(name)
            new.meta = {**old.meta, "val": tensors[name]}
            node.replace_input_with(old, new)
            _tell_decisions(gm, node, old, new)
    gm.graph.eliminate_dead_code()
    used = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    for name in list(_tensors(gm)):
        if name not in used and name not in tensors:
            path, _, leaf = name.rpartition(".")
            delattr(gm.get_submodule(path), leaf)


def _tell_decisions(gm: fx.GraphModule, reader: fx.Node, old: fx.Node, new: fx.Node) -> None:
    """The decisions on one op, or on the ops that are computed with it, are about its new tensor."""
    for node in gm.graph.nodes:
        decision = decision_of(node)
        if decision is None or (node is not reader and reader not in decision.members and not _feeds(reader, node)):
            continue
        if decision.weight is old:
            decision.weight = new
        if decision.bias is old:
            decision.bias = new


def _feeds(reader: fx.Node, node: fx.Node) -> bool:
    """Is the reader the quantizer of an input of this op?"""
    return reader.op == "call_module" and reader in node.all_input_nodes


def _example_to_json(example: Example) -> tuple[dict[str, Any], dict[str, Tensor]]:
    leaves, spec = pytree.tree_flatten((example.args, example.kwargs))
    tensors = {f"{EXAMPLE}{i}": v.detach().contiguous().cpu() for i, v in enumerate(leaves) if isinstance(v, Tensor)}
    plain = [None if isinstance(v, Tensor) else v for v in leaves]
    shapes = {k: _dims_to_json(v) for k, v in example.dynamic_shapes.items()}
    return {"tree": pytree.treespec_dumps(spec), "values": plain, "dynamic_shapes": shapes}, tensors


def _example_from_json(saved: dict[str, Any], tensors: dict[str, Tensor]) -> Example:
    leaves = [tensors.get(f"{EXAMPLE}{i}", v) for i, v in enumerate(saved["values"])]
    args, kwargs = pytree.tree_unflatten(leaves, pytree.treespec_loads(saved["tree"]))
    return Example(tuple(args), kwargs, {k: _dims_from_json(v) for k, v in saved["dynamic_shapes"].items()})


def _dims_to_json(spec: Any) -> Any:
    """{0: Dim.DYNAMIC} of one tensor as {"dims": [0]}, in any nesting of lists and dicts."""
    if isinstance(spec, dict) and spec and all(isinstance(k, int) for k in spec):
        return {"dims": sorted(spec)}
    if isinstance(spec, dict):
        return {"dict": {k: _dims_to_json(v) for k, v in spec.items()}}
    if isinstance(spec, (list, tuple)):
        return [_dims_to_json(v) for v in spec]
    return None


def _dims_from_json(saved: Any) -> Any:
    if isinstance(saved, dict) and "dims" in saved:
        return {int(d): Dim.DYNAMIC for d in saved["dims"]}
    if isinstance(saved, dict):
        return {k: _dims_from_json(v) for k, v in saved["dict"].items()}
    return [_dims_from_json(v) for v in saved] if isinstance(saved, list) else None


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Both files, checked."""
    for name in (ABOUT, TENSORS):
        if not (folder / name).is_file():
            raise LoadError(
                f"{name} is missing", where=str(folder), remedy="Give a folder that graphq.save has written."
            )
    try:
        about = json.loads((folder / ABOUT).read_text())
        version, sums = about["graphq"], about.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise LoadError(
            f"{ABOUT} is damaged: {type(e).__name__} {e}", where=str(folder / ABOUT), remedy="Save the graph again."
        ) from e
    if version != VERSION:
        raise LoadError(
            f"it has version {version}, this graphq reads version {VERSION}",
            where=str(folder / ABOUT),
            remedy="Load it with the graphq that has written it.",
        )
    damaged = ABOUT if sums.get("about") != _sha256(_text(about)) else ""
    damaged = damaged or (TENSORS if sums.get("tensors") != _sha256((folder / TENSORS).read_bytes()) else "")
    if damaged:
        raise LoadError(
            f"{damaged} is not what was saved: its checksum differs",
            where=str(folder / damaged),
            remedy="It is truncated or was changed. Save the graph again.",
        )
    try:
        return about, load_file(folder / TENSORS)
    except SafetensorError as e:
        raise LoadError(f"{TENSORS} is damaged: {e}", where=str(folder), remedy="Save the graph again.") from e


def _text(about: dict[str, Any]) -> bytes:
    return json.dumps(about, sort_keys=True).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
