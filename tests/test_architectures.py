"""Architectures of transformers, with seeded random weights and no line of code for any of them: traced, quantized,
exported, run in ONNX Runtime with another batch size, verified, and explained."""

import pytest
import torch
import transformers as hf

import graphq

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LARGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(32).reshape(2, 16) + 5
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}

CASES = {
    "bert": (hf.BertModel, hf.BertConfig(**SMALL, vocab_size=200), TEXT),
    "distilbert": (
        hf.DistilBertModel,
        hf.DistilBertConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=128, vocab_size=200),
        TEXT,
    ),
    "vit": (hf.ViTModel, hf.ViTConfig(**SMALL, image_size=32, patch_size=8), {"pixel_values": PIXELS}),
    "swin": (
        hf.SwinModel,
        hf.SwinConfig(embed_dim=16, depths=[2, 2], num_heads=[2, 4], image_size=64, patch_size=4, window_size=4),
        {"pixel_values": LARGE},
    ),
    "convnext": (
        hf.ConvNextModel,
        hf.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 2], num_stages=2),
        {"pixel_values": LARGE},
    ),
    "resnet": (
        hf.ResNetForImageClassification,
        hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], num_labels=10),
        {"pixel_values": LARGE},
    ),
    "mobilenet_v2": (
        hf.MobileNetV2ForImageClassification,
        hf.MobileNetV2Config(depth_multiplier=0.35, num_labels=10),
        {"pixel_values": LARGE},
    ),
    "clip_vision": (
        hf.CLIPVisionModel,
        hf.CLIPVisionConfig(**SMALL, image_size=32, patch_size=8),
        {"pixel_values": PIXELS},
    ),
    "whisper_encoder": (
        hf.models.whisper.modeling_whisper.WhisperEncoder,
        hf.WhisperConfig(
            d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128, num_mel_bins=16,
            max_source_positions=50,
        ),
        {"input_features": torch.randn(2, 16, 100, generator=torch.Generator().manual_seed(0))},
    ),
    "gpt2": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config(
            n_embd=64, n_layer=2, n_head=4, vocab_size=200, n_positions=64, use_cache=False, bos_token_id=1,
            eos_token_id=2,
        ),
        {"input_ids": IDS},
    ),
    "llama": (
        hf.LlamaForCausalLM,
        hf.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=200, use_cache=False),
        {"input_ids": IDS},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_architecture(name, tmp_path):
    cls, config, inputs = CASES[name]
    model = cls(config).eval()
    data = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(2)]
    dynamic = "batch+sequence" if "input_ids" in inputs else "batch"
    quantized = graphq.quantize(model, "int8", data, dynamic_shapes=dynamic, progress=False)
    path = graphq.export(quantized, tmp_path / "model.onnx")
    three = {k: torch.cat([v, v[:1]]) for k, v in inputs.items()}
    result = graphq.verify(quantized, path, [three])
    assert result.share_equal >= 0.998
    assert result.largest <= 1
    assert result.kernels_sqnr >= 90 and result.floats_sqnr >= 90
    assert result.unseen == []
    explanation = graphq.explain(quantized, path)
    assert explanation.disagreements == []
    assert explanation.undecided == []
    products = [r for r in explanation.rows if r.op in ("conv1d", "conv2d", "linear")]
    assert products
    assert all(r.action == "quantize" for r in products)
    if name != "mobilenet_v2":  # untrained, its activations vanish: there is next to no signal to keep
        assert graphq.compare(model, quantized, [three], per_op=False).sqnr > 20
