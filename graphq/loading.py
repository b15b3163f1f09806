"""Models and data from the words of a command line.

MODEL   model.pt2 | hf:DIR (a local transformers folder) | module:factory (a callable that returns a model)
DATA    data.npz | a folder of images | lines.txt (with an hf: model's tokenizer) | module:loader
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graphq.errors import CalibrationError, CaptureError, ConfigError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_model(text: str) -> Any:
    """An nn.Module or ExportedProgram. Raises CaptureError with what was expected."""
    if text.startswith("hf:"):
        return _from_transformers(Path(text[3:]))
    if text.endswith(".pt2"):
        if not Path(text).is_file():
            raise CaptureError(
                "there is no such file", where=text, remedy="torch.export.save(program, path) makes one."
            )
        return torch.export.load(text)
    if ":" in text:
        return _call(text, "model")
    raise CaptureError(
        f"cannot tell what {text!r} is",
        remedy="Give model.pt2, hf:DIR, or module:factory (a callable without arguments).",
    )


def load_data(text: str, model: str, *, samples: int, length: int = 128, size: int = 224) -> list[Any]:
    """Batches of one sample. length: tokens per line of text. size: pixels of an image's side."""
    path = Path(text)
    if text.endswith(".npz"):
        batches = _from_npz(path)
    elif path.is_dir():
        batches = _from_images(path, model, samples, size)
    elif text.endswith(".txt"):
        batches = _from_text(path, model, samples, length)
    elif ":" in text:
        made = _call(text, "data")
        if not isinstance(made, Iterable):
            raise CalibrationError(
                f"{text} returned a {type(made).__name__}, not batches", remedy="Return an iterable."
            )
        batches = list(made)
    else:
        raise CalibrationError(
            f"cannot tell what {text!r} is", remedy="Give a .npz, a folder of images, a .txt, or module:loader."
        )
    if not batches:
        raise CalibrationError("there is no calibration data", where=text, remedy="Put samples there.")
    return batches[:samples]


def _call(text: str, what: str) -> Any:
    name, _, attribute = text.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"cannot import {attribute!r} of {name!r}: {e}", where=text, remedy="Check the names.") from e
    return made() if callable(made) and not isinstance(made, torch.nn.Module) else made


def _from_transformers(folder: Path) -> torch.nn.Module:
    config = folder / "config.json"
    if not config.is_file():
        raise CaptureError("this is not a transformers folder: no config.json", where=str(folder), remedy="Check it.")
    import transformers

    names = json.loads(config.read_text()).get("architectures") or ["AutoModel"]
    cls = getattr(transformers, names[0], transformers.AutoModel)
    model: torch.nn.Module = cls.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def _from_npz(path: Path) -> list[Any]:
    if not path.is_file():
        raise CalibrationError("there is no such file", where=str(path), remedy="numpy.savez(path, input=array).")
    with np.load(path) as file:
        arrays = {k: torch.from_numpy(file[k]) for k in file.files}
    count = min(len(a) for a in arrays.values())
    if all(k.startswith("arr_") for k in arrays):
        return [tuple(a[i : i + 1] for a in arrays.values()) for i in range(count)]
    return [{k: a[i : i + 1] for k, a in arrays.items()} for i in range(count)]


def _from_images(folder: Path, model: str, samples: int, size: int) -> list[Any]:
    from PIL import Image

    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES)[:samples]
    photos = [Image.open(f).convert("RGB") for f in files]
    if model.startswith("hf:") and (Path(model[3:]) / "preprocessor_config.json").is_file():
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(model[3:])
        return [dict(processor(p, return_tensors="pt")) for p in photos]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = [torch.from_numpy(np.asarray(p.resize((size, size)), dtype=np.float32).copy()) for p in photos]
    return [((p.permute(2, 0, 1) / 255 - mean) / std)[None] for p in pixels]


def _from_text(path: Path, model: str, samples: int, length: int) -> list[Any]:
    if not model.startswith("hf:"):
        raise CalibrationError("text needs a tokenizer", where=str(path), remedy="Give the model as hf:DIR.")
    if not path.is_file():
        raise CalibrationError("there is no such file", where=str(path), remedy="One sample a line.")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model[3:])
    lines = [line for line in path.read_text(errors="ignore").splitlines() if line.strip()][:samples]
    return [
        dict(tokenizer(line, padding="max_length", truncation=True, max_length=length, return_tensors="pt"))
        for line in lines
    ]
