"""How attention is computed on a CPU: by matrix products in bf16, where sequences are short; the same but for rounding."""

import sys

import pytest
import timm
import torch
from running import EXAMPLES

sys.path.append(str(EXAMPLES))
from engine.attention import SHORT, fit_attention

CPU, SIZES = torch.device("cpu"), {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


def ways(model: torch.nn.Module) -> set[bool]:
    return {module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")}


@pytest.mark.parametrize(
    ("tokens", "precision", "device", "fused"),
    [
        (SHORT, "bf16", "cpu", False),
        (SHORT + 1, "bf16", "cpu", True),
        (17, "float32", "cpu", True),
        (17, "auto", "cpu", True),
        (17, "bf16", "cuda", True),
    ],
)
def test_products_are_used_in_bf16_on_a_cpu_for_short_sequences(tokens, precision, device, fused):
    model = timm.create_model("vit_tiny_patch16_224", **SIZES)
    fit_attention(model, tokens, precision, torch.device(device))
    assert ways(model) == {fused}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_both_ways_give_the_same_features_and_gradients(name):
    torch.manual_seed(0)
    model = timm.create_model(name, **SIZES, num_classes=0).eval().double()
    images, found = torch.randn(3, 3, 16, 16, dtype=torch.float64), []
    for _ in range(2):
        features = model(images)
        model.zero_grad()
        features.square().sum().backward()
        found.append((features.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)))
        fit_attention(model, 17, "bf16", CPU)
    assert ways(model) == {False}
    for fused, products in zip(*found, strict=True):
        torch.testing.assert_close(products, fused, rtol=1e-10, atol=1e-12)
