"""How attention is computed on a CPU: by matrix products in bf16, where sequences are short; the same but for rounding."""

import sys

import pytest
import timm
import torch
from running import EXAMPLES

sys.path.append(str(EXAMPLES))
from tasks.config import SHORT, prefer_plain_attention


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_products_in_bf16_on_a_cpu_for_short_sequences_give_the_same_features_and_gradients(name):
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    model, found = timm.create_model(name, **sizes).eval().double(), []
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    for tokens, precision, device, fused in (
        (SHORT + 1, "bf16", "cpu", True),
        (17, "float32", "cpu", True),
        (17, "bf16", "cuda", True),
        (SHORT, "bf16", "cpu", False),
    ):
        prefer_plain_attention(model, tokens, precision, torch.device(device))
        assert {module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")} == {fused}
        features = model(images)
        model.zero_grad()
        features.square().sum().backward()
        found.append((features.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)))
    for fused, products in zip(found[0], found[-1], strict=True):
        torch.testing.assert_close(products, fused, rtol=1e-10, atol=1e-12)
