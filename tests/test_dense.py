"""The windowed trunk, the pyramids and UPerNet's head, against plain ViTs, slow loops and others' numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN, MaskRCNN

import mvmae  # noqa: F401
from mvmae.dense import FCNHead, UPerHead, ViTPyramid, WindowedViT
from mvmae.dense.windows import WindowAttention

PLAIN: dict[str, Any] = {"depth": 4, "class_token": False, "global_pool": "avg"}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer scale, normalised queries": {"init_values": 0.1, "qk_norm": True},
    "norm before the blocks": {"pre_norm": True},
    "no positions": {"pos_embed": "none"},
    "rectangular": {"img_size": (32, 48)},
    "normalised attention": {"scale_attn_norm": True},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("window", [None, 6])
def test_one_window_over_all_equals_forward_intermediates_exactly(
    tiny_vit: Callable[..., Any], name: str, window: int | None
) -> None:
    vit = tiny_vit(**(PLAIN | VARIANTS[name])).eval()
    trunk = WindowedViT(vit, vit.patch_embed.img_size, taps=(0, 1, 2, 3), window_size=window, rel_pos=False).eval()
    images = torch.randn(2, 3, *vit.patch_embed.img_size)
    expected = vit.forward_intermediates(images, indices=[0, 1, 2, 3], intermediates_only=True)
    for ours, timms in zip(trunk(images), expected, strict=True):
        assert torch.equal(ours, timms)


def test_prefix_tokens_are_left_out_and_the_given_encoder_stays_as_it_is(tiny_vit: Callable[..., Any]) -> None:
    vit = tiny_vit(depth=4, reg_tokens=2).eval()
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    trunk, images = WindowedViT(vit, 32, window_size=None, rel_pos=False).eval(), torch.randn(1, 3, 32, 32)
    plain = tiny_vit(**PLAIN, fc_norm=False).eval()
    weights = {key: value for key, value in before.items() if key not in ("cls_token", "reg_token")}
    plain.load_state_dict(weights | {"pos_embed": vit.pos_embed[:, vit.num_prefix_tokens :]})
    assert torch.equal(trunk(images)[3], plain.forward_intermediates(images, indices=[3], intermediates_only=True)[0])
    assert vit.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())
    assert set(trunk.state_dict()) == {
        key for key in before if not key.startswith(("norm.", "head", "fc_norm", "cls_token", "reg_token"))
    }


def slow_windows(vit: Any, images: Tensor, window: int, whole: set[int]) -> Tensor:
    """timm's own blocks, with the attention of each window computed by itself."""
    _, _, height, width = images.shape
    rows, columns = height // 8, width // 8
    tokens = vit.patch_embed(images) + vit.pos_embed
    for index, block in enumerate(vit.blocks):
        normed = block.norm1(tokens).view(len(images), rows, columns, -1)
        out = torch.zeros_like(normed)
        side_h, side_w = (rows, columns) if index in whole else (min(window, rows), min(window, columns))
        for image in range(len(images)):
            for top in range(0, rows, side_h):
                for left in range(0, columns, side_w):
                    part = normed[image, top : top + side_h, left : left + side_w]
                    filled = normed.new_zeros(side_h, side_w, part.shape[-1])
                    filled[: part.shape[0], : part.shape[1]] = part
                    seen = block.attn(filled.flatten(0, 1)[None])[0].view(side_h, side_w, -1)
                    out[image, top : top + side_h, left : left + side_w] = seen[: part.shape[0], : part.shape[1]]
        tokens = tokens + block.ls1(out.view_as(tokens))
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    return tokens.view(len(images), rows, columns, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (40, 24), (56, 40)])
@pytest.mark.parametrize("rel_pos", [False, True])
def test_windows_equal_those_of_the_plain_vit_in_a_slow_loop(
    tiny_vit: Callable[..., Any], size: tuple[int, int], rel_pos: bool
) -> None:
    vit = tiny_vit(**(PLAIN | {"img_size": size, "init_values": 0.5, "depth": 8})).eval()
    trunk = WindowedViT(vit, size, window_size=2, rel_pos=rel_pos).eval()
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(trunk(images)[3], slow_windows(vit, images, 2, {1, 3, 5, 7}), rtol=1e-5, atol=1e-5)


def test_relative_positions_equal_biases_in_a_slow_loop(tiny_vit: Callable[..., Any]) -> None:
    attn = tiny_vit().blocks[0].attn
    fast = WindowAttention(attn, positions=(2, 3)).eval()
    torch.nn.init.normal_(fast.rel_pos_h)
    torch.nn.init.normal_(fast.rel_pos_w)
    x = torch.randn(1, 2, 3, 48)
    q, k, v = attn.qkv(x.flatten(1, 2)).view(6, 3, 3, 16).permute(1, 2, 0, 3)
    bias = torch.empty(3, 6, 6)
    for head in range(3):
        for a in range(6):
            for b in range(6):
                down, right = a // 3 - b // 3, a % 3 - b % 3
                bias[head, a, b] = q[head, a] @ fast.rel_pos_h[down + 1] + q[head, a] @ fast.rel_pos_w[right + 2]
    out = ((q @ k.mT / 4 + bias).softmax(-1) @ v).transpose(0, 1).flatten(1)
    torch.testing.assert_close(fast(x)[0].flatten(0, 1), attn.proj(out), rtol=1e-5, atol=1e-5)


def test_relative_positions_are_interpolated_for_another_size(tiny_vit: Callable[..., Any]) -> None:
    attention = WindowAttention(tiny_vit().blocks[0].attn, positions=(2, 2)).eval()
    x = torch.randn(1, 5, 3, 48)
    before = attention(x)
    assert torch.isfinite(before).all()
    torch.nn.init.constant_(attention.rel_pos_h, 0.3)  # the same at each distance: no key gains on another
    torch.testing.assert_close(attention(x), before, rtol=1e-5, atol=1e-5)
    torch.nn.init.normal_(attention.rel_pos_h)
    assert not torch.allclose(attention(x), before, atol=1e-3)


def test_positions_are_resized_or_built_anew(tiny_vit: Callable[..., Any]) -> None:
    fixed = timm.create_model("mvmae_vit_tiny_patch16", img_size=64)
    rebuilt = WindowedViT(fixed, (64, 96), rebuild=True)
    larger = timm.create_model("mvmae_vit_tiny_patch16", img_size=(64, 96))
    assert torch.equal(rebuilt.pos_embed, larger.pos_embed[:, 1:])
    resized = WindowedViT(fixed, (64, 96))
    assert resized.pos_embed.shape == rebuilt.pos_embed.shape
    assert not torch.allclose(resized.pos_embed, rebuilt.pos_embed, atol=1e-2)
    assert torch.equal(WindowedViT(fixed, 64).pos_embed, fixed.pos_embed[:, 1:])
    other = tiny_vit()  # whose table is no sine and cosine
    assert torch.equal(WindowedViT(other, 64, rebuild=True).pos_embed, WindowedViT(other, 64).pos_embed)
    fixed.pos_embed.requires_grad_(False)
    assert not WindowedViT(fixed, 96).pos_embed.requires_grad


def test_checkpointing_changes_neither_outputs_nor_gradients(tiny_vit: Callable[..., Any]) -> None:
    vit, images = tiny_vit(**PLAIN), torch.randn(2, 3, 40, 24)
    plain, saving = (WindowedViT(vit, 32, window_size=2, grad_checkpointing=flag) for flag in (False, True))
    for trunk in (plain, saving):
        sum(x.square().mean() for x in trunk(images)).backward()
    assert torch.equal(plain(images)[3], saving(images)[3])
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert a.grad is not None and torch.equal(a.grad, b.grad), name


SIZES = {(48, 64): [(24, 32), (12, 16), (6, 8), (3, 4), (2, 2)], (40, 8): [(20, 4), (10, 2), (5, 1), (3, 1), (2, 1)]}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("style", ["li2021", "beit"])
def test_every_parameter_gets_a_gradient_and_the_strides_double(
    tiny_vit: Callable[..., Any], style: Any, size: tuple[int, int]
) -> None:
    trunk = WindowedViT(tiny_vit(depth=4), 64, window_size=2, taps=(0, 1, 2, 3))
    pyramid = ViTPyramid(trunk, style, out_channels=64)
    maps = pyramid(torch.randn(2, 3, *size))
    assert list(maps) == ["0", "1", "2", "3"] + ["pool"] * (style != "beit")
    assert [tuple(x.shape[2:]) for x in maps.values()] == SIZES[size][: len(maps)]
    assert {x.shape[1] for x in maps.values()} == {pyramid.out_channels} == {48 if style == "beit" else 64}
    sum(x.square().mean() for x in maps.values()).backward()
    assert [name for name, p in pyramid.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("detector", [FasterRCNN, MaskRCNN])
def test_a_detector_of_torchvision_takes_it_as_its_backbone(tiny_vit: Callable[..., Any], detector: Any) -> None:
    backbone = ViTPyramid(WindowedViT(tiny_vit(depth=4), 64, window_size=4), out_channels=32)
    model = detector(backbone, num_classes=3, min_size=64, max_size=96)
    masks = torch.zeros(1, 60, 70, dtype=torch.uint8)
    masks[0, 10:40, 5:30] = 1
    target = {"boxes": torch.tensor([[5.0, 10.0, 30.0, 40.0]]), "labels": torch.tensor([1]), "masks": masks}
    losses = model([torch.rand(3, 60, 70), torch.rand(3, 50, 40)], [target, dict(target)])
    sum(losses.values()).backward()
    assert backbone.trunk.patch_embed.proj.weight.grad.abs().sum() > 0
    assert backbone.trunk.blocks[0].attn.rel_pos_h.grad is not None
    assert set(model.eval()([torch.rand(3, 60, 70)])[0]) >= {"boxes", "labels", "scores"}


def test_what_does_not_fit_is_refused_by_name(tiny_vit: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="must be a timm VisionTransformer or Eva, got ResNet"):
        WindowedViT(timm.create_model("resnet18"))
    with pytest.raises(TypeError, match="ParallelScalingBlock is not timm's Attention"):
        WindowedViT(tiny_vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock), 32)
    with pytest.raises(ValueError, match=r"taps must be blocks among 0..1, got \(1, 2\)"):
        WindowedViT(tiny_vit(), 32, taps=(1, 2))
    with pytest.raises(ValueError, match="window_size must be at least 1 patch, .*, got 0"):
        WindowedViT(tiny_vit(), 32, window_size=0)
    trunk = WindowedViT(tiny_vit(), 32, taps=(1,))
    with pytest.raises(ValueError, match="image size must be a multiple of the patch size 8, got 36x32"):
        trunk(torch.randn(1, 3, 36, 32))
    with pytest.raises(ValueError, match="must have 4 taps, got 1"):
        ViTPyramid(trunk)
    with pytest.raises(ValueError, match="style must be .*, got 'fpn'"):
        ViTPyramid(WindowedViT(tiny_vit(), 32), "fpn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="UPerHead must be trained on at least 2 images, got 1"):
        UPerHead([8] * 4, 2, channels=8)({str(level): torch.randn(1, 8, 4, 4) for level in range(4)})


def test_the_head_of_upernet_equals_that_of_transformers() -> None:
    upernet = pytest.importorskip("transformers.models.upernet.modeling_upernet", reason="transformers is not installed")
    theirs = upernet.UperNetHead(upernet.UperNetConfig(hidden_size=24, num_labels=5), [16] * 4).eval()
    ours = UPerHead([16] * 4, 5, channels=24).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    weights = sorted(theirs.state_dict().items(), key=lambda item: item[0].startswith("classifier"))  # it stands first there
    ours.load_state_dict(dict(zip(ours.state_dict(), (value for _, value in weights), strict=True)))
    maps = [torch.randn(2, 16, 24 >> level, 16 >> level) for level in range(4)]
    torch.testing.assert_close(ours(dict(zip("0123", maps, strict=True))), theirs(maps), rtol=1e-4, atol=1e-4)


def test_the_head_names_the_classes_of_each_place_of_the_finest_map() -> None:
    head = UPerHead([16] * 4, 5, channels=8).eval()
    maps = {str(level): torch.randn(2, 16, 24 >> level, 16 >> level) for level in range(4)}
    assert head(maps).shape == (2, 5, 24, 16)
    assert FCNHead(16, 5, channels=8).eval()(maps["2"]).shape == (2, 5, 6, 4)
    for level in maps:  # each map reaches the result
        changed = dict(maps, **{level: torch.zeros_like(maps[level])})
        assert not torch.allclose(head(changed), head(maps))
