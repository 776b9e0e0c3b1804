"""Other projects' checkpoints in the layouts in which they are published: the tokens of their own encoders.

The layouts are those of the projects' public code. Where that is installed (transformers, torchvision) it computes the tokens;
else a timm model, whose weights are written under the project's names.
"""

import argparse
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from running import EXAMPLES, run_script
from test_hub import mae_positions
from torch import Tensor, nn

import mvmae
from mvmae import hub
from mvmae.dense import WindowedViT
from mvmae.inputs import inputs_of
from mvmae.weights import WeightsError

sys.path.append(str(EXAMPLES))
import segment
from tasks.models import check_plain, load_backbone, start_encoder, summary

IMAGENET, HALF = (0.485, 0.456, 0.406), (0.5, 0.5, 0.5)
SMALL = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
VIT, SCALED = "vit_tiny_patch16_224", {"init_values": 0.1}
Weights = dict[str, Tensor]


class Peer(NamedTuple):
    """A file, and what must come of it."""

    content: Any  # what is saved
    tokens: Callable[[Tensor], Tensor]
    mean: tuple[float, ...] = HALF  # as recorded
    arch: str = VIT
    size: dict[str, Any] = SMALL
    said: str = ""  # of the family, in the line about the model


def filled(model: Any) -> Any:
    """Gives every weight of a model a value that is neither zero nor one, and equal to no other."""
    generator = torch.Generator().manual_seed(len(list(model.parameters())))
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.mul_(0.5).add_(0.2 * torch.rand(value.shape, generator=generator) + 0.02)
    return model.eval()


def vit(arch: str = VIT, **options: Any) -> Any:
    sizes = {"img_size": 32, "num_classes": 0, **SMALL}
    return filled(timm.create_model(arch, **{**sizes, **options}))


def under(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


def renamed(weights: Weights, *changes: tuple[str, str]) -> Weights:
    for old, new in changes:
        weights = {re.sub(old, new, name): value for name, value in weights.items()}
    return weights


def with_separate_biases(weights: Weights) -> Weights:
    """The attention of BEiT's code: no bias of the key, whose part is zero here too."""
    found = dict(weights)
    for name in [name for name in weights if name.endswith("qkv.bias")]:
        query, key, value = found.pop(name).chunk(3)
        key.zero_()  # in the model, too
        found |= {name.replace("qkv.bias", "q_bias"): query, name.replace("qkv.bias", "v_bias"): value}
    return renamed(found, (r"ls([12])\.gamma", r"gamma_\1"))


HEAD = {"head.weight": torch.randn(10, 48), "head.bias": torch.randn(10)}
PROJECTOR = {"head.mlp.0.weight": torch.randn(8, 48), "head.last_layer.weight_g": torch.randn(8, 1)}


def mae(**more: Tensor) -> Peer:
    model = vit()
    model.pos_embed.data.copy_(mae_positions(48, 4))
    return Peer({"model": {**model.state_dict(), **more}}, model.forward_features, IMAGENET, said="weights of MAE")


def mae_whole() -> Peer:
    decoder = {"decoder_pos_embed": mae_positions(32, 4), "decoder_blocks.0.attn.qkv.bias": torch.randn(96)}
    return mae(mask_token=torch.randn(1, 1, 32), **decoder)


def mae_probe() -> Peer:
    return mae(
        **{f"head.0.running_{name}": torch.rand(48) for name in ("mean", "var")},
        **under("head.1.", {"weight": torch.rand(9, 48)}),
    )


def dino(more: Weights | None = None, name: str = "DINO") -> Peer:
    student, teacher = vit(), vit(qkv_bias=True)
    teacher.cls_token.data.add_(1)
    content = {
        "student": under("module.", {**under("backbone.", student.state_dict()), **PROJECTOR, **(more or {})}),
        "teacher": {**under("backbone.", teacher.state_dict()), **PROJECTOR},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small"),
        "dino_loss": {"center": torch.zeros(1, 8)},
    }
    return Peer(content, teacher.forward_features, IMAGENET, said="class token")


def moco() -> Peer:
    base, momentum = vit(), vit()
    momentum.cls_token.data.add_(1)
    projector = {"head.0.weight": torch.randn(8, 48), "head.1.running_mean": torch.randn(8)}
    parts = {"base_encoder.": {**base.state_dict(), **projector}, "momentum_encoder.": {**momentum.state_dict(), **projector}}
    weights = {name: value for part, own in parts.items() for name, value in under(f"module.{part}", own).items()}
    weights["module.predictor.0.weight"] = torch.randn(8, 8)
    return Peer({"arch": "vit_small", "state_dict": weights}, base.forward_features, IMAGENET, said="weights of MoCo v3")


def moco_small() -> Peer:
    """Its linear probe's file: 12 heads for a width of 384, as only its positions tell."""
    model = vit(embed_dim=384, depth=1, num_heads=12)
    table = mae_positions(384, 4)
    table[:, 1:] = table[:, 1:].unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    model.pos_embed.data.copy_(table)
    weights = under("module.", {**model.state_dict(), "head.weight": torch.randn(10, 384), "head.bias": torch.randn(10)})
    size = {"patch_size": 8, "embed_dim": 384, "depth": 1}
    return Peer({"state_dict": weights}, model.forward_features, IMAGENET, "vit_small_patch16_224", size, "class token")


def moco_resnet() -> Peer:
    return resnet("module.base_encoder.", "module.momentum_encoder.", said="weights of MoCo v3")


def resnet(*prefixes: str, mean: tuple[float, ...] = IMAGENET, said: str = "") -> Peer:
    model = filled(torchvision.models.resnet18())
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("fc.")}
    both = {name: value for prefix in prefixes or ("",) for name, value in under(prefix, weights).items()}
    both |= under(prefixes[0] if prefixes else "", {"fc.weight": torch.randn(10, 512), "fc.bias": torch.randn(10)})
    children = list(model.children())[:-2]
    return Peer({"state_dict": both}, nn.Sequential(*children), mean, "resnet18", {}, said)


def simclr(width: int) -> Peer:
    """Google's ResNet-50 with all channels times ``width`` and one block a stage, by torch's functions alone."""
    draw, weights = torch.Generator().manual_seed(width), dict[str, Tensor]()

    def add(conv: str, norm: str, rows: int, columns: int, side: int) -> None:
        weights[f"{conv}.weight"] = torch.randn(rows, columns, side, side, generator=draw) / side / columns**0.5
        for name, least in (("weight", 0.5), ("bias", -0.2), ("running_mean", -0.2), ("running_var", 0.5)):
            weights[f"{norm}.{name}"] = least + torch.rand(rows, generator=draw)

    def run(x: Tensor, conv: str, norm: str, stride: int = 1) -> Tensor:
        kernel = weights[f"{conv}.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[3] // 2)
        return F.batch_norm(x, *(weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")))

    def tokens(x: Tensor) -> Tensor:
        x = F.max_pool2d(run(x, "conv1", "bn1", 2).relu(), 3, 2, 1)
        for block in (f"layer{stage}.0" for stage in (1, 2, 3, 4)):
            stride = 1 if block == "layer1.0" else 2
            inner = run(x, f"{block}.conv1", f"{block}.bn1").relu()
            inner = run(inner, f"{block}.conv2", f"{block}.bn2", stride).relu()
            inner = run(inner, f"{block}.conv3", f"{block}.bn3")
            x = (inner + run(x, f"{block}.downsample.0", f"{block}.downsample.1", stride)).relu()
        return x

    given = 64 * width
    add("conv1", "bn1", given, 3, 7)
    for stage in (1, 2, 3, 4):
        block, planes = f"layer{stage}.0", 32 * width * 2**stage
        for number, shape in enumerate(((planes, given, 1), (planes, planes, 3), (4 * planes, planes, 1)), 1):
            add(f"{block}.conv{number}", f"{block}.bn{number}", *shape)
        add(f"{block}.downsample.0", f"{block}.downsample.1", 4 * planes, given, 1)
        given = 4 * planes
    head = {"fc.weight": torch.randn(10, given), "fc.bias": torch.randn(10)}
    arch, size = f"simclr_resnet50x{width}", {"layers": (1, 1, 1, 1)}
    return Peer({"state_dict": {**weights, **head}}, tokens, (0.0, 0.0, 0.0), arch, size)


def beit(
    key: str = "model", shared: bool = True, more: Weights | None = None, global_pool: str = "token", **about: Any
) -> Peer:
    model = vit("beit_base_patch16_224", global_pool=global_pool)
    weights = dict(model.state_dict())
    name = "relative_position_bias_table"
    if shared:
        table = weights[f"blocks.0.attn.{name}"]
        for block in range(2):
            model.blocks[block].attn.relative_position_bias_table.data.copy_(table)
            del weights[f"blocks.{block}.attn.{name}"]
        weights[f"rel_pos_bias.{name}"] = table
        weights["rel_pos_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.long)
    weights |= more or {}
    size = {**SMALL, "global_pool": global_pool}
    return Peer({key: weights}, model.forward_features, arch="beit_base_patch16_224", size=size, **about)


PRETRAINED = {"mask_token": torch.randn(1, 1, 48), "lm_head.weight": torch.randn(7, 48), "lm_head.bias": torch.randn(7)}


def simmim() -> Peer:
    peer = beit(mean=IMAGENET, said="weights of SimMIM")
    encoder = under("encoder.", {**peer.content["model"], "mask_token": torch.randn(1, 1, 48)})
    module = types.ModuleType("yacs.config")
    kind = type("CfgNode", (dict,), {"__module__": "yacs.config", "__qualname__": "CfgNode"})
    module.CfgNode = kind  # type: ignore[attr-defined]
    options = kind(MODEL=kind(TYPE="vit"), TAG="x")
    options.__dict__["__immutable__"] = True
    content = {"model": {**encoder, "decoder.0.weight": torch.randn(192, 48, 1, 1)}, "config": options, "epoch": 799}
    return peer._replace(content=(content, module))


def cae(arch: str) -> Peer:
    beits = {"use_abs_pos_emb": True, "use_rel_pos_bias": False, "global_pool": "token"} if arch.startswith("beit") else SCALED
    model = vit(arch, **beits)
    weights = with_separate_biases(dict(model.state_dict()))
    other = {name: value + 1 for name, value in weights.items()}
    content = {**under("encoder.", weights), **under("teacher.", other), "pretext_neck.norm.weight": torch.randn(48)}
    content["mask_token"] = torch.randn(1, 1, 48)
    size = {**SMALL, "global_pool": "token"}
    return Peer({"model": content}, model.forward_features, IMAGENET, arch, size, "weights of CAE")


def deit3() -> Peer:
    model = vit("deit3_small_patch16_224")
    weights = renamed(model.state_dict(), (r"ls([12])\.gamma", r"gamma_\1"))
    return Peer({"model": {**weights, **HEAD}}, model.forward_features, IMAGENET, "deit3_small_patch16_224")


def distilled() -> Peer:
    model = vit("deit_tiny_distilled_patch16_224")
    weights = {**model.state_dict(), **HEAD, **renamed(HEAD, ("head", "head_dist"))}
    return Peer({"model": weights}, model.forward_features, IMAGENET, "deit_tiny_distilled_patch16_224")


def dinov2(registers: bool, chunks: bool = False) -> Peer:
    arch = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    model = vit(arch)
    weights = {**model.state_dict(), "mask_token": torch.randn(1, 48)}
    if registers:  # the class token has a position there, which timm adds to it
        of_class = torch.randn(1, 1, 48)
        weights["register_tokens"] = weights.pop("reg_token")
        weights["cls_token"] = weights["cls_token"] - of_class
        weights["pos_embed"] = torch.cat([of_class, weights["pos_embed"]], dim=1)
    content = {"teacher": under("backbone.", renamed(weights, (r"^blocks\.", "blocks.0.")))} if chunks else weights
    return Peer(content, model.forward_features, IMAGENET, arch, said="weights of DINOv2")


def dinov3(bias: bool) -> Peer:
    arch = "vit_small_patch16_dinov3_qkvb" if bias else "vit_small_patch16_dinov3"
    model = vit(arch)
    names = (r"gamma_([12])", r"ls\1.gamma"), ("reg_token", "storage_tokens")
    weights = renamed(model.state_dict(), *names)
    for block in range(2):
        name = f"blocks.{block}.attn."
        query, value = (weights.pop(f"{name}{part}_bias", torch.zeros(48)) for part in "qv")
        weights |= {f"{name}qkv.bias": torch.cat([query, torch.randn(48), value])}
        weights |= {f"{name}qkv.bias_mask": torch.cat([torch.ones(48), torch.zeros(48), torch.ones(48)])}
    weights |= {"mask_token": torch.randn(1, 48), "rope_embed.periods": torch.randn(3)}
    return Peer(weights, model.forward_features, IMAGENET, arch, said="weights of DINOv3, its authors probe the class token")


def ijepa() -> Peer:
    model, target = vit(class_token=False, global_pool="avg", fc_norm=False), vit(class_token=False, global_pool="avg")
    target.pos_embed.data.add_(1)
    parts = {"encoder": model, "target_encoder": target}
    content: dict[str, Any] = {name: under("module.", part.state_dict()) for name, part in parts.items()}
    content |= {"predictor": {"module.mask_token": torch.randn(1, 1, 24)}, "opt": {"state": {}}, "scaler": None, "epoch": 300}
    size = {**SMALL, "class_token": False, "global_pool": "avg", "fc_norm": False}
    return Peer(content, model.forward_features, IMAGENET, size=size, said="mean patch token")


def clip() -> Peer:
    model = vit("vit_base_patch16_clip_224", num_classes=0)
    names: list[tuple[str, str]] = [
        ("patch_embed.proj", "conv1"),
        ("pos_embed", "positional_embedding"),
        ("norm_pre", "ln_pre"),
    ]
    names += [(r"^norm\.", "ln_post."), (r"\.norm([12])", r".ln_\1"), (r"qkv\.", "in_proj_"), (r"attn\.proj", "attn.out_proj")]
    names += [
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("^blocks", "transformer.resblocks"),
        ("cls_token", "class_embedding"),
    ]
    weights = renamed(model.state_dict(), *names)
    weights["class_embedding"], weights["positional_embedding"] = (
        weights["class_embedding"][0, 0],
        weights["positional_embedding"][0],
    )
    weights["proj"] = torch.randn(48, 10)
    text = {"transformer.resblocks.0.ln_1.weight": torch.randn(8), "logit_scale": torch.randn(())}
    mean = timm.get_pretrained_cfg("vit_base_patch16_clip_224.openai").mean
    arch = "vit_base_patch16_clip_224.openai"
    return Peer({**under("visual.", weights), **text}, model.forward_features, mean, arch, said="class token")


def torchvision_vit() -> Peer:
    model = filled(torchvision.models.VisionTransformer(32, 8, 2, 4, 48, 192, num_classes=10))

    def tokens(images: Tensor) -> Tensor:
        patches = model._process_input(images)
        found: Tensor = model.encoder(torch.cat([model.class_token.expand(len(images), -1, -1), patches], dim=1))
        return found

    return Peer(model.state_dict(), tokens, IMAGENET, said="weights of torchvision")


def mmpretrain() -> Peer:
    model = vit(**SCALED)
    names = [
        (r"patch_embed\.proj", "patch_embed.projection"),
        (r"^norm\.", "ln1."),
        ("^blocks", "layers"),
        (r"\.norm([12])", r".ln\1"),
    ]
    names += [(r"mlp\.fc1", "ffn.layers.0.0"), (r"mlp\.fc2", "ffn.layers.1"), (r"ls1\.gamma", "attn.gamma1.weight")]
    weights = renamed(model.state_dict(), *names, (r"ls2\.gamma", "ffn.gamma2.weight"))
    head = {"head.layers.head.weight": torch.randn(10, 48)}
    return Peer({"meta": {"epoch": 3}, "state_dict": {**under("backbone.", weights), **head}}, model.forward_features)


def same_names(arch: str, key: str | None = None, mean: tuple[float, ...] = IMAGENET, **options: Any) -> Peer:
    """A file in the names of timm's model itself, beside a head."""
    model = filled(timm.create_model(arch, num_classes=0, **options))
    weights = {**model.state_dict(), f"{model.pretrained_cfg['classifier']}.weight": torch.randn(10, model.num_features)}
    return Peer({key: weights} if key else weights, model.forward_features, mean, arch, options)


SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2)}
PEERS: dict[str, Callable[[], Peer]] = {
    "MAE": mae,
    "MAE with its decoder": mae_whole,
    "MAE's linear probe": mae_probe,
    "DINO's backbone": lambda: Peer((model := vit()).state_dict(), model.forward_features),
    "DINO": dino,
    "iBOT": lambda: dino({"backbone.masked_embed": torch.randn(1, 48)}),
    "iBOT's backbone": lambda: Peer({"state_dict": (model := vit()).state_dict()}, model.forward_features),
    "MoCo v3": moco,
    "MoCo v3 ViT-S, linear probe": moco_small,
    "MoCo v3 ResNet": moco_resnet,
    "torchvision's ResNet": resnet,
    "SimCLR 1x": lambda: simclr(1),
    "SimCLR 2x": lambda: simclr(2),
    "SimCLR 4x": lambda: simclr(4),
    "BEiT": lambda: beit(more=PRETRAINED, said="mean patch token"),
    "BEiT v2": lambda: beit("module", more={**PRETRAINED, "cls_pt_layers.0.attn.q_bias": torch.randn(48)}),
    "BEiT, fine-tuned": lambda: beit(shared=False, more=HEAD, global_pool="avg"),
    "data2vec": lambda: beit(more=PRETRAINED),
    "SimMIM": simmim,
    "CAE": lambda: cae(VIT),
    "CAE as BEiT": lambda: cae("beit_base_patch16_224"),
    "DeiT": lambda: Peer({"model": {**(model := vit()).state_dict(), **HEAD}}, model.forward_features),
    "DeiT, distilled": distilled,
    "DeiT-3": deit3,
    "DINOv2": lambda: dinov2(False),
    "DINOv2 with registers": lambda: dinov2(True),
    "DINOv2's teacher": lambda: dinov2(True, chunks=True),
    "DINOv3": lambda: dinov3(False),
    "DINOv3 with biases": lambda: dinov3(True),
    "I-JEPA": ijepa,
    "CLIP": clip,
    "EVA-02": lambda: same_names(
        "eva02_tiny_patch14_224", "module", timm.get_pretrained_cfg("eva02_tiny_patch14_224").mean, img_size=28, depth=2
    ),
    "Swin": lambda: same_names("swin_tiny_patch4_window7_224", "model", **SWIN),
    "ConvNeXt": lambda: same_names("convnext_atto", "model", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)),
    "torchvision's ViT": torchvision_vit,
    "mmpretrain": mmpretrain,
}


def save(peer: Peer, path: Path) -> Path:
    content, module = peer.content if isinstance(peer.content, tuple) else (peer.content, None)
    with pytest.MonkeyPatch.context() as patch:
        if module:  # of a package that is not there when the file is read
            patch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
            patch.setitem(sys.modules, "yacs.config", module)
        torch.save(content, path)
    return path


def difference(model: Any, peer: Peer, images: Tensor | None = None) -> float:
    side = 28 if "eva02" in peer.arch else 32
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) if images is None else images
    expected = peer.tokens(images)
    assert expected.std() > 0.01  # else nothing is compared
    return float((model.eval().forward_features(images) - expected).abs().max() / expected.abs().max().clamp(min=1))


@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_a_peer_s_file_gives_its_own_tokens_mean_and_vector(name, tmp_path):
    peer = PEERS[name]()
    file = save(peer, tmp_path / "file.pth")
    size = (
        peer.size
        if "img_size" in peer.size or peer.arch.startswith(("res", "simclr", "convnext"))
        else {"img_size": 32, **peer.size}
    )
    loaded: Any = load_backbone(str(file), arch=peer.arch, **size)
    options: dict[str, Any] = {"pretrained_cfg_overlay": {"file": str(file)}, "num_classes": 0, **size}
    names = [
        peer.arch,
        *(["mvmae_vit_base_patch16"] if peer.arch == VIT and peer.mean == IMAGENET else []),
    ]  # ours are read the same way
    for model in (loaded, *(mvmae.create_model(name, pretrained=True, **options) for name in names)):
        assert difference(model, peer) < 2e-5
        assert inputs_of(model).mean == pytest.approx(peer.mean)
        assert peer.said in summary(model)


@pytest.mark.parametrize("name", ["DINO", "MoCo v3 ViT-S, linear probe", "MoCo v3 ResNet", "BEiT", "I-JEPA"])
@torch.no_grad()
def test_feature_maps_of_a_peer_s_file_are_those_of_its_whole_model(name, tmp_path):
    peer = PEERS[name]()
    overlay = {"file": str(save(peer, tmp_path / "file.pth"))}
    size = peer.size if peer.arch.startswith("res") or "img_size" in peer.size else {"img_size": 32, **peer.size}
    options: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": overlay, **size}
    whole: Any = mvmae.create_model(peer.arch, num_classes=0, **options).eval()
    features: Any = mvmae.create_model(peer.arch, features_only=True, out_indices=(0,), **options).eval()
    images = torch.rand(2, 3, 32, 32)
    expected = whole.forward_intermediates(images, indices=[0], intermediates_only=True)
    for maps, other in zip(features(images), expected, strict=True):
        torch.testing.assert_close(maps, other, rtol=0, atol=0)
    assert inputs_of(features).mean == pytest.approx(peer.mean)


HF = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
HF |= {"intermediate_size": 96, "layer_norm_eps": 1e-6}
RELATIVE = {"use_relative_position_bias": True}
OF_TRANSFORMERS: dict[str, tuple[str, dict[str, Any], str]] = {  # class, its options, and timm's name for its bare file
    "ViT": ("ViT", {}, VIT),
    "DeiT": ("DeiT", {}, "deit_tiny_distilled_patch16_224"),
    "I-JEPA": ("IJepa", {}, ""),
    "DINOv2": ("Dinov2", {"mlp_ratio": 2}, "vit_small_patch14_dinov2"),
    "DINOv2 with registers": ("Dinov2WithRegisters", {"mlp_ratio": 2}, "vit_small_patch14_reg4_dinov2"),
    "DINOv3": ("DINOv3ViT", {"num_register_tokens": 4, "layer_norm_eps": 1e-5}, "vit_small_patch16_dinov3_qkvb"),
    "BEiT": ("Beit", RELATIVE, "beit_base_patch16_224"),
    "BEiT, shared": ("Beit", {"use_shared_relative_position_bias": True}, "beit_base_patch16_224"),
    "BEiT, class token": ("Beit", {**RELATIVE, "use_mean_pooling": False}, ""),
    "data2vec": ("Data2VecVision", {**RELATIVE, "use_absolute_position_embeddings": True}, ""),
}


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
@torch.no_grad()
def test_a_folder_and_a_file_of_transformers_give_its_tokens(name, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="4.56")
    kind, options, arch = OF_TRANSFORMERS[name]
    of_kind = f"{kind}ForImageClassification" if kind == "Data2VecVision" else f"{kind}Model"  # whose encoder lacks the norm
    model = filled(getattr(transformers, of_kind)(getattr(transformers, f"{kind}Config")(**{**HF, **options})))
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.4, 0.4, 0.4], "image_std": [0.2, 0.2, 0.2]}'
    )
    peer = Peer(None, lambda images: getattr(model, "data2vec_vision", model)(images).last_hidden_state)
    images = torch.rand(2, 3, 32, 32)
    loaded: Any = load_backbone(str(tmp_path / "saved"))
    assert difference(loaded, peer, images) < 2e-5
    assert inputs_of(loaded).mean == (0.4, 0.4, 0.4)
    again: Any = load_backbone(f"random:{tmp_path / 'saved'}")
    hub.load_encoder(again, model.state_dict())
    assert difference(again, peer, images) < 2e-5
    if arch:
        size = {**SMALL, "mlp_ratio": 2, "img_size": 32}
        alone: Any = load_backbone(str(tmp_path / "saved" / "model.safetensors"), arch=arch, **size)
        assert difference(alone, peer, images) < 2e-5


def test_a_folder_of_another_model_of_transformers_is_named(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, vocab_size=9
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"transformers' models .* are known, got 'bert': [^\n]*--arch[^\n]*$"):
        load_backbone(str(tmp_path))
    with pytest.raises(WeightsError, match="does not fit the model: .* missing"):
        load_backbone(str(tmp_path), arch=VIT)


def missing(weights: Weights) -> str:
    name = next(name for name in weights if name.endswith("blocks.1.mlp.fc1.weight"))
    del weights[name]
    return r"1 missing \(blocks\.1\.mlp\.fc1\.weight\)"


def transposed(weights: Weights) -> str:
    name = next(name for name in weights if name.endswith("blocks.1.mlp.fc1.weight"))
    weights[name] = weights[name].t().contiguous()
    return r"blocks\.1\.mlp\.fc1\.weight is \(48, 192\) instead of \(192, 48\)"


def one_more(weights: Weights) -> str:
    first = next(name for name in weights if name.endswith("blocks.0.mlp.fc1.weight"))
    weights[first.replace("fc1", "extra")] = torch.zeros(3)
    return r"1 unexpected \(blocks\.0\.mlp\.extra\.weight\)"


@pytest.mark.parametrize("damage", [one_more, missing, transposed])
@pytest.mark.parametrize("name", ["MAE with its decoder", "BEiT", "CAE", "DINOv2 with registers", "DINOv3", "I-JEPA"])
def test_a_file_with_one_tensor_wrong_is_refused_by_name(name, damage):
    peer = PEERS[name]()
    weights = dict(peer.content.get("model", peer.content.get("encoder", peer.content)))
    cause = damage(weights)
    model = vit(peer.arch, **{**peer.size, **(SCALED if name == "CAE" else {})})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=cause) as error:
        hub.load_encoder(model, weights)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_weights_of_another_family_are_refused():
    for name, arch in (
        ("Swin", VIT),
        ("MAE", "beit_base_patch16_224"),
        ("BEiT", VIT),
        ("torchvision's ResNet", VIT),
        ("DINO", "resnet18"),
    ):
        model = vit(arch) if "16" in arch else timm.create_model(arch)
        with pytest.raises(WeightsError, match="(missing|unexpected|no place)"):
            hub.load_encoder(model, PEERS[name]().content)


def test_heads_biases_and_widths_that_a_model_has_no_place_for_are_refused():
    peer = moco_small()
    model: Any = timm.create_model(peer.arch, img_size=32, **peer.size)
    with pytest.raises(WeightsError, match=r"MoCo v3's ViT of width 384 has 12 heads, the model 6: [^\n]*num_heads=12$"):
        hub.load_encoder(model, peer.content)
    with pytest.raises(WeightsError, match=r"blocks\.0\.attn\.qkv\.bias is not zero, and the model has no place [^\n]*qkvb$"):
        hub.load_encoder(vit("vit_small_patch16_dinov3"), dinov3(True).content)
    wide = {"conv1.weight": torch.zeros(128, 3, 7, 7), "bn1.weight": torch.zeros(128)}
    with pytest.raises(WeightsError, match=r"stem of 128 channels, .*: build simclr_resnet50x2$"):
        hub.load_encoder(timm.create_model("resnet50"), wide)


def test_which_encoder_is_taken_and_that_nothing_says_the_mean_are_logged(tmp_path, caplog):
    file = save(dino(), tmp_path / "dino.pth")
    hub.load_encoder(vit(), file)
    told = "taking the encoder teacher.backbone. of the checkpoint, not student.module.backbone.: "
    assert caplog.messages == [f"{told}to take that, save it in a file of its own"]
    caplog.clear()
    hub.load_encoder(vit(), save(PEERS["DINO's backbone"](), tmp_path / "file.pth"))
    assert len(caplog.messages) == 1 and "--mean 0.485 0.456 0.406 --std 0.229" in caplog.messages[0]


def test_an_encoder_that_lacks_a_weight_is_not_passed_over_for_another():
    content = dino().content
    del content["teacher"]["backbone.cls_token"]
    with pytest.raises(WeightsError, match=r"1 missing \(cls_token\)"):
        hub.load_encoder(vit(), content)


def test_a_pickle_of_another_class_is_still_refused(tmp_path):
    peer = simmim()
    module = peer.content[1]
    module.CfgNode.__name__ = module.CfgNode.__qualname__ = "Other"
    module.Other = module.CfgNode
    with pytest.raises(WeightsError, match="could run code"):
        hub.load_encoder(vit(), save(peer, tmp_path / "file.pth"))


@pytest.mark.parametrize("arch", ["resnet18", "simclr_resnet50x2", "beit_base_patch16_224", "swin_tiny_patch4_window7_224"])
def test_scripts_for_plain_vits_refuse_others_before_any_data_is_read(arch, tmp_path):
    with pytest.raises(TypeError, match=r"^the encoder must be a timm VisionTransformer or Eva, got [^\n]*$"):
        check_plain(arch)  # of adapt.py, detect.py and segment.py
    if arch == "resnet18":
        done = run_script("adapt.py", "--encoder", arch, "--data", "nowhere", folder=tmp_path)
        assert done.code == 2 and "got ResNet" in done.err and done.err.count("\n") == 1


ADAPTED = ["MAE", "MAE with its decoder", "DINO", "MoCo v3", "DINOv2", "DINOv2 with registers", "CAE", "I-JEPA", "DINOv3"]


@pytest.mark.parametrize("name", ADAPTED)
@torch.no_grad()
def test_adapting_starts_from_the_tokens_of_a_peer_that_is_a_plain_vit(name, tmp_path):
    peer = PEERS[name]()
    file = save(peer, tmp_path / "file.pth")
    arguments = " ".join(f"{key}={value!r}" for key, value in peer.size.items())
    encoder = start_encoder(str(file), arguments, pretrained=True, arch=peer.arch, image_size=(32,))
    assert difference(encoder, peer) < 2e-5 and inputs_of(encoder).mean == pytest.approx(peer.mean)


DENSE = ["--preset", "toy", "--image-size", 32, "--channels", 16, "--toy-images", 8, "--batch-size", 4, "--steps", 2, "--lr", 0]
DENSE += ["--workers", 0, "--device", "cpu", "--pictures", 0, "--output-dir", "run"]


@pytest.mark.parametrize("name", ["MAE", "MAE with its decoder", "DINO", "MoCo v3"])
@torch.no_grad()
def test_segmentation_starts_from_a_peer_s_file_with_timm_s_features(name, tmp_path):
    """A rate of 0 leaves the encoder in the checkpoint as it was loaded. The trunk has no class token, as Li et al. (2021)."""
    peer = PEERS[name]()
    file = save(peer, tmp_path / "file.pth")
    size = " ".join(f"{key}={value}" for key, value in {**SMALL, "img_size": 32}.items())
    result = run_script("segment.py", *DENSE, "--model", file, "--arch", VIT, "--model-args", size, folder=tmp_path)
    assert result.code == 0 and "mean 0.485 0.456 0.406" in result.out, result
    saved = torch.load(tmp_path / "run/checkpoint.pt", weights_only=False)["model"]
    trunk = WindowedViT(vit(), 32, window_size=None, taps=segment.taps(2)).eval()
    trunk.load_state_dict({key.removeprefix("backbone.trunk."): x for key, x in saved.items() if "backbone.trunk." in key})
    loaded: Any = load_backbone(str(file), arch=VIT, img_size=32, **SMALL)
    plain = vit(class_token=False, global_pool="avg", fc_norm=False)
    weights = {key: value for key, value in loaded.state_dict().items() if key != "cls_token"}
    plain.load_state_dict(weights | {"pos_embed": loaded.pos_embed[:, 1:]})
    images = torch.rand(2, 3, 32, 32)
    expected = plain.forward_intermediates(images, indices=segment.taps(2), intermediates_only=True)
    for ours, timms in zip(trunk(images)[-2:], expected[-2:], strict=True):
        assert (ours - timms).abs().max() < 2e-5 * timms.abs().max()  # some are above 50


@pytest.mark.parametrize(("script", "name"), [("segment.py", "BEiT"), ("segment.py", "MoCo v3 ResNet"), ("detect.py", "Swin")])
def test_detection_and_segmentation_refuse_a_peer_s_file_of_another_kind_in_one_line(script, name, tmp_path):
    peer = PEERS[name]()
    arguments = ["--model", save(peer, tmp_path / "file.pth"), "--arch", peer.arch, "--model-args", "", "--data", "nowhere"]
    result = run_script(script, *DENSE, *arguments, folder=tmp_path)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "must be a timm VisionTransformer or Eva, got" in result.err and not result.out
