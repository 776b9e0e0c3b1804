from functools import partial

import pytest
import torch
from torch import nn

from mvmae import Mask, encode_visible, random_mask

FAMILIES = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "register tokens": {"reg_tokens": 4},
    "no_embed_class": {"no_embed_class": True, "reg_tokens": 2},
    "pre_norm": {"pre_norm": True},
    "layer scale": {"init_values": 0.1},
    "QK norm": {"qk_norm": True},
    "another patch size": {"patch_size": 4},
    "oblong patches": {"patch_size": (8, 4)},
    "4 channels": {"in_chans": 4},
    "96 x 160": {"img_size": (96, 160), "patch_size": 16},
    "no positions": {"pos_embed": "none"},
    "fc_norm": {"global_pool": "avg", "fc_norm": True},
    "attention pool": {"global_pool": "map"},
    "head": {"num_classes": 7},
    "norm of patches": {"embed_norm_layer": partial(nn.LayerNorm, eps=1e-6)},
    "drop path": {"drop_path_rate": 0.5},
    "gradient checkpointing": {},
}


def nothing_masked(images, patches):
    return Mask.from_masked(torch.zeros(len(images), patches, dtype=torch.bool))


@pytest.mark.parametrize("family", FAMILIES)
def test_with_nothing_masked_it_equals_timm(tiny_vit, family):
    vit = tiny_vit(**FAMILIES[family]).eval().double()
    vit.set_grad_checkpointing(family == "gradient checkpointing")
    images = torch.randn(2, vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size, dtype=torch.float64)
    encoded = encode_visible(vit, images, nothing_masked(images, vit.patch_embed.num_patches))
    torch.testing.assert_close(encoded, vit.forward_features(images), rtol=1e-10, atol=1e-10)


def test_with_dynamic_image_size_it_equals_timm_at_another_size(tiny_vit):
    vit = tiny_vit(dynamic_img_size=True).eval().double()
    images = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    torch.testing.assert_close(encode_visible(vit, images, nothing_masked(images, 15)), vit.forward_features(images))


def test_visible_tokens_equal_timm_on_a_sequence_of_those_patches_alone(tiny_vit):
    vit = tiny_vit(reg_tokens=2).eval().double()
    images, mask = torch.randn(3, 3, 32, 32, dtype=torch.float64), random_mask(3, 16, 0.75)
    tokens = vit.patch_embed(images) + vit.pos_embed[:, 3:]
    prefix = torch.cat([vit.cls_token, vit.reg_token], dim=1) + vit.pos_embed[:, :3]
    for b in range(3):
        alone = torch.stack([tokens[b, i] for i in mask.visible[b]])
        expected = vit.norm(vit.blocks(torch.cat([prefix[0], alone])[None]))[0]
        torch.testing.assert_close(encode_visible(vit, images, mask)[b], expected)


def test_hooks_and_other_modules_of_the_patch_projection_are_not_passed_by(tiny_vit):
    vit, images = tiny_vit().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    nn.utils.parametrizations.weight_norm(vit.patch_embed.proj)
    nn.init.normal_(vit.patch_embed.proj.parametrizations.weight.original0)
    torch.testing.assert_close(encode_visible(vit, images, nothing_masked(images, 16)), vit.forward_features(images))
    vit = tiny_vit().double()
    vit.patch_embed.proj.register_forward_hook(lambda module, given, result: 2 * result)
    torch.testing.assert_close(encode_visible(vit, images, nothing_masked(images, 16)), vit.forward_features(images))


def test_images_and_masks_that_do_not_fit_are_refused(tiny_vit):
    vit, mask = tiny_vit(), random_mask(2, 16, 0.5)
    with pytest.raises(ValueError, match=r"image size must be the encoder's 32x32, got 40x40: build the encoder with img_size"):
        encode_visible(vit, torch.zeros(2, 3, 40, 40), mask)
    with pytest.raises(ValueError, match="image size must be a multiple of the patch size 8, got 30x32"):
        encode_visible(vit, torch.zeros(2, 3, 30, 32), mask)
    with pytest.raises(ValueError, match=r"must have the shape \(B, 3, H, W\) .*, got \(2, 4, 32, 32\)"):
        encode_visible(vit, torch.zeros(2, 4, 32, 32), mask)
    with pytest.raises(ValueError, match=r"the mask must be for \(3, 16\) .*, got \(2, 16\)"):
        encode_visible(vit, torch.zeros(3, 3, 32, 32), mask)
    with pytest.raises(TypeError, match=r"must be floating point, .*, got torch.uint8"):
        encode_visible(vit, torch.zeros(2, 3, 32, 32, dtype=torch.uint8), mask)
