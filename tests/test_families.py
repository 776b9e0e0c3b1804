"""Visible patches through any plain ViT of timm: every public family, as timm builds it with few blocks, and odd options."""

import json
from functools import partial

import pytest
import timm
import torch
import torch.nn.utils.prune

import mvmae
from mvmae import Mask, MultiViewMAE, encode_visible, hub, random_mask
from mvmae.encoders import TIMM_NAMES
from mvmae.weights import WeightsError

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 0}
FAMILIES = {
    "supervised": "vit_small_patch32_224.augreg_in21k_ft_in1k",
    "AugReg": "vit_small_patch16_224.augreg_in21k",
    "MAE": "vit_base_patch16_224.mae",
    "DINO": "vit_small_patch16_224.dino",
    "DINOv2, registers, layer scale": "vit_small_patch14_reg4_dinov2.lvd142m",
    "CLIP, norm before the blocks": "vit_base_patch16_clip_224.openai",
    "SigLIP, map pooling": "vit_base_patch16_siglip_224.webli",
    "SigLIP, mean": "vit_base_patch16_siglip_gap_224.webli",
    "DeiT-3": "deit3_small_patch16_224.fb_in1k",
    "DeiT, distilled": "deit_small_distilled_patch16_224.fb_in1k",
    "DINOv3": "vit_small_patch16_dinov3.lvd1689m",
    "DINOv3, biases": "vit_small_patch16_dinov3_qkvb.lvd1689m",
    "EVA-02": "eva02_tiny_patch14_224.mim_in22k",
    "EVA-02 CLIP": "eva02_base_patch16_clip_224.merged2b",
    "EVA, no rotary positions": "eva_large_patch14_196.in22k_ft_in1k",
    "EVA, norm after": "eva02_enormous_patch14_clip_224.laion2b",
    "RoPE, mixed, learned positions": "vit_small_patch16_rope_mixed_ape_224.naver_in1k",
    "RoPE, no class token": "vit_base_patch16_rope_reg1_gap_256.sbb_in1k",
    "Perception Encoder": "vit_pe_core_tiny_patch16_384.fb",
    "ours": "mvmae_vit_tiny_patch16.untrained",
}
OPTIONS = {
    "class token of its own": {"no_embed_class": True, "reg_tokens": 2},
    "QK norm": {"qk_norm": True},
    "oblong patches": {"patch_size": (8, 4)},
    "4 channels": {"in_chans": 4},
    "96 x 160": {"img_size": (96, 160), "patch_size": 16},
    "no positions": {"pos_embed": "none"},
    "fc_norm": {"global_pool": "avg", "fc_norm": True},
    "head": {"num_classes": 7},
    "norm of patches": {"embed_norm_layer": partial(torch.nn.LayerNorm, eps=1e-6)},
    "drop path": {"drop_path_rate": 0.5},
    "gradient checkpointing": {},
}
ROTARY = ("DINOv3", "EVA-02", "RoPE, mixed, learned positions", "RoPE, no class token", "Perception Encoder")


def build(family, **kwargs):
    """With weights that count: positions and layer scales that start near zero would hide what is wrong elsewhere."""
    vit = timm.create_model(FAMILIES[family], **{**TINY, **kwargs})
    for name, parameter in vit.named_parameters():
        if "gamma" in name or parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1 if "gamma" in name else 0.2)
    if vit.pos_embed is not None:
        torch.nn.init.normal_(vit.pos_embed)
    return vit.eval()


def nothing_masked(images, patches):
    return Mask.from_masked(torch.zeros(len(images), patches, dtype=torch.bool))


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_masked_equals_timm_and_masked_patches_do_not_leak(family):
    vit = build(family).double()
    images, mask = torch.randn(2, 3, 32, 32, dtype=torch.float64), random_mask(2, 16, 0.75)
    encoded = encode_visible(vit, images, nothing_masked(images, 16))
    torch.testing.assert_close(encoded, vit.forward_features(images), rtol=1e-10, atol=1e-10)
    before = encode_visible(vit, images, mask)
    hidden = mask.masked.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.equal(encode_visible(vit, images.masked_fill(hidden, float("nan")), mask), before)
    assert not torch.equal(encode_visible(vit, torch.where(hidden, images, images + 1), mask), before)


@pytest.mark.parametrize("option", OPTIONS)
def test_with_nothing_masked_every_option_equals_timm(tiny_vit, option):
    vit = tiny_vit(**OPTIONS[option]).eval().double()
    vit.set_grad_checkpointing(option == "gradient checkpointing")
    images = torch.randn(2, vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size, dtype=torch.float64)
    encoded = encode_visible(vit, images, nothing_masked(images, vit.patch_embed.num_patches))
    torch.testing.assert_close(encoded, vit.forward_features(images), rtol=1e-10, atol=1e-10)


def test_visible_tokens_equal_timm_on_a_sequence_of_those_patches_alone(tiny_vit):
    vit = tiny_vit(reg_tokens=2).eval().double()
    images, mask = torch.randn(3, 3, 32, 32, dtype=torch.float64), random_mask(3, 16, 0.75)
    tokens = vit.patch_embed(images) + vit.pos_embed[:, 3:]
    prefix = torch.cat([vit.cls_token, vit.reg_token], dim=1) + vit.pos_embed[:, :3]
    for b in range(3):
        alone = torch.stack([tokens[b, i] for i in mask.visible[b]])
        expected = vit.norm(vit.blocks(torch.cat([prefix[0], alone])[None]))[0]
        torch.testing.assert_close(encode_visible(vit, images, mask)[b], expected)


def pruned(vit):
    torch.nn.utils.prune.random_unstructured(vit.patch_embed.proj, "weight", 0.5)


def weight_normed(vit):
    torch.nn.utils.parametrizations.weight_norm(vit.patch_embed.proj)
    torch.nn.init.normal_(vit.patch_embed.proj.parametrizations.weight.original0)


def with_lora(vit):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(vit, peft.LoraConfig(target_modules=["patch_embed.proj", "qkv"], init_lora_weights=False)).eval()


def hooked(vit):
    vit.patch_embed.proj.register_forward_hook(lambda module, given, result: 2 * result)


def replaced(vit):
    vit.patch_embed.proj = torch.nn.Sequential(vit.patch_embed.proj, torch.nn.Conv2d(48, 48, 1))


@pytest.mark.parametrize("change", [pruned, weight_normed, with_lora, hooked, replaced])
def test_what_is_put_on_the_patch_projection_is_not_passed_by(change, tiny_vit):
    vit = tiny_vit()
    change(vit)
    vit.double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(encode_visible(vit, images, nothing_masked(images, 16)), vit.forward_features(images))


def test_hooks_of_the_patch_embedding_which_is_not_called_are_refused(tiny_vit):
    vit, images = tiny_vit(), torch.randn(2, 3, 32, 32)
    vit.patch_embed.register_forward_pre_hook(lambda module, given: (2 * given[0],))
    with pytest.raises(TypeError, match="patch_embed has hooks"):
        encode_visible(vit, images, nothing_masked(images, 16))


@pytest.mark.parametrize("family", ROTARY)
def test_a_visible_patch_keeps_its_rotary_position(family):
    vit = build(family).double()
    images, mask = torch.randn(2, 3, 32, 32, dtype=torch.float64), random_mask(2, 16, 0.5)
    encoded = encode_visible(vit, images, mask)
    prefix = vit.num_prefix_tokens
    for b in range(2):  # timm's own blocks, with the masked patches kept out of the attention
        tokens, rope = vit._pos_embed(vit.patch_embed(images[b : b + 1]))
        tokens, seen = vit.norm_pre(tokens), torch.cat([torch.ones(prefix, dtype=torch.bool), ~mask.masked[b]])
        for i, block in enumerate(vit.blocks):
            tokens = block(tokens, rope=rope[i] if rope.ndim == 4 else rope, attn_mask=seen[None, None, None])
        torch.testing.assert_close(encoded[b, prefix:], vit.norm(tokens)[0, prefix:][mask.visible[b]])


@pytest.mark.parametrize("family", [*ROTARY, "MAE"])
@pytest.mark.parametrize("size", [(24, 40), (32, 32)])
def test_rectangles_dynamic_sizes_and_recomputed_blocks_equal_timm(family, size):
    vit = build(family, dynamic_img_size=True).double()
    vit.set_grad_checkpointing(size == (32, 32))
    images = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    patches = nothing_masked(images, size[0] * size[1] // 64)
    torch.testing.assert_close(encode_visible(vit, images, patches), vit.forward_features(images))
    fixed = build(family, img_size=(24, 40)).double()
    images = torch.randn(2, 3, 24, 40, dtype=torch.float64)
    torch.testing.assert_close(encode_visible(fixed, images, nothing_masked(images, 15)), fixed.forward_features(images))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_trains_all_it_should_and_the_export_is_timms(family, tmp_path):
    vit = build(family)
    names, before = list(vit.state_dict()), {name: value.clone() for name, value in vit.state_dict().items()}
    model = MultiViewMAE(vit, decoder_dim=16, decoder_depth=1, decoder_heads=2).train()
    assert list(model.encoder.state_dict()) == names
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model(torch.randn(4, 2, 3, 32, 32)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    optimizer.step()
    same = [name for name, value in vit.state_dict().items() if torch.equal(value, before[name])]
    fixed = ("attn_pool.", "head", *(["pos_embed"] if family == "ours" else []))
    assert [name for name in same if not name.startswith(fixed)] == []
    assert vit.pos_embed is None or vit.pos_embed.requires_grad == (family != "ours")

    hub.export(model, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    expected, name = vit.eval().forward_features(images), FAMILIES[family].partition(".")[0]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == TIMM_NAMES.get(name, name)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval().forward_features(images), expected)
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 0}
    by_name = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **TINY).eval()
    assert torch.equal(by_name.forward_features(images), expected)
    again = timm.create_model(name, **TINY).eval()
    hub.load_encoder(again, tmp_path)
    assert torch.equal(again.forward_features(images), expected)
    whole = MultiViewMAE.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(whole[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "must be .*, got SwinTransformer .*windows and merged patches"),
        ("convnext_atto", "must be .*, got ConvNeXt .*convolutions see across patches"),
        ("hiera_tiny_224", "must be .*, got Hiera .*pools patches between its stages"),
        ("beit_base_patch16_224", "must be .*, got Beit .*relative positions"),
        ("resnet18", "must be a timm VisionTransformer or Eva, got ResNet .*convolutions see across patches"),
        ("vit_tiny_r_s16_p8_224", "must see one patch alone, got HybridEmbed"),
    ],
)
def test_what_is_not_supported_is_refused_by_name_with_the_reason(name, reason):
    with pytest.raises(TypeError, match=reason):
        MultiViewMAE(timm.create_model(name, device="meta"))
    with pytest.raises(TypeError, match="patch_drop_rate"):
        MultiViewMAE(build("DINOv3", patch_drop_rate=0.5))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 40, 40), "encoder's 32x32, got 40x40: build the encoder with img_size"),
        (torch.zeros(2, 3, 30, 32), "multiple of the patch size 8, got 30x32"),
        (torch.zeros(2, 4, 32, 32), r"\(B, 3, H, W\) .*, got \(2, 4, 32, 32\)"),
        (torch.zeros(3, 3, 32, 32), r"mask must be for \(3, 16\) .*, got \(2, 16\)"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "floating point, .*, got torch.uint8"),
    ],
)
def test_images_and_masks_that_do_not_fit_are_refused(tiny_vit, images, message):
    with pytest.raises((ValueError, TypeError), match=message):
        encode_visible(tiny_vit(), images, random_mask(2, 16, 0.5))


@pytest.mark.parametrize(("old", "new"), [((16, 64), (32, 32)), ((32, 64), (64, 32)), ((24, 40), (32, 32))])
@pytest.mark.parametrize("family", ["supervised", "EVA, no rotary positions", "ours"])
def test_positions_of_a_rectangle_are_resized_as_one_or_asked_about(family, old, new, tmp_path):
    vit = build(family, img_size=old)
    MultiViewMAE(vit, decoder_dim=16, decoder_depth=1, decoder_heads=2).save_pretrained(tmp_path / "pretraining")
    hub.export(vit, tmp_path / "export")
    prefix, rows, columns = vit.num_prefix_tokens, *vit.patch_embed.grid_size
    table = vit.pos_embed.detach()[:, prefix:].unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
    table = torch.nn.functional.interpolate(table, [side // 8 for side in new], mode="bicubic", antialias=True)
    wanted = table.flatten(2).mT
    for source, size in ((tmp_path / "export", None), (tmp_path / "pretraining", None), (vit.state_dict(), old)):
        loaded = build(family, img_size=new)
        hub.load_encoder(loaded, source, size=size)
        assert torch.allclose(loaded.pos_embed[:, prefix:], wanted, atol=1e-5)
    created = mvmae.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True, img_size=new)
    assert torch.allclose(created.pos_embed[:, prefix:], wanted, atol=1e-5)
    if new[0] != new[1]:  # of as many patches, and another shape
        with pytest.raises(WeightsError, match=r"give the size of the images"):
            hub.load_encoder(build(family, img_size=new), vit.state_dict())
