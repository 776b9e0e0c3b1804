"""Weights of transformers' ViTMAE: the same features, predictions and loss here as there."""

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from hub_server import Hub
from running import EXAMPLES
from test_hub import features, hub_repo
from test_hub import mae_positions as table
from torch.nn.functional import layer_norm

import mvmae
from mvmae import hub
from mvmae.masking import Mask
from mvmae.weights import WeightsError

sys.path.append(str(EXAMPLES))
from engine.signals import Stop
from tasks.models import load_backbone, start_encoder, starting_weights

transformers = pytest.importorskip("transformers")
SIZES = {
    "small": {},
    "deep": {"num_hidden_layers": 3, "decoder_num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 160},
    "fine": {"patch_size": 4, "image_size": 16, "num_channels": 3},
    "five channels": {"num_channels": 5, "num_attention_heads": 2},
    "no bias": {"qkv_bias": False},
    "epsilon": {"layer_norm_eps": 1e-6},
}
ENCODER = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 128,
}


def vitmae(**options: Any) -> Any:
    """Builds transformers' model with random weights, biases and positions, all of them other than zero or one."""
    config = transformers.ViTMAEConfig(**{**ENCODER, **DECODER, **options})
    model = transformers.ViTMAEForPreTraining(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            if name == "decoder.decoder_pos_embed":
                parameter.copy_(table(config.decoder_hidden_size, config.image_size // config.patch_size))
    return model


def ours(peer: Any) -> Any:
    """Builds this package's model of the same sizes, with transformers' epsilon and other random weights."""
    config = peer.config
    vit = timm.create_model(
        "mvmae_vit_tiny_patch16",
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.num_channels,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        qkv_bias=config.qkv_bias,
        norm_layer=partial(torch.nn.LayerNorm, eps=config.layer_norm_eps),
    )
    model = mvmae.MultiViewMAE(
        vit,
        decoder_dim=config.decoder_hidden_size,
        decoder_depth=config.decoder_num_hidden_layers,
        decoder_heads=config.decoder_num_attention_heads,
        loss_weight=0.0,
        norm_pix=config.norm_pix_loss,
    ).eval()
    for module in model.decoder.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = config.layer_norm_eps
    return model


def images_for(peer: Any) -> torch.Tensor:
    side = peer.config.image_size
    return torch.randn(2, peer.config.num_channels, side, side, generator=torch.Generator().manual_seed(1))


def names_of_4(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames weights as transformers 4 names them, in memory and in files: the published checkpoints."""
    changes = [
        (r"^vit\.layers\.", "vit.encoder.layer."),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ]
    renamed = {}
    for name, value in weights.items():
        for old, new in changes:
            name = re.sub(old, new, name)
        renamed[name] = value
    assert "vit.encoder.layer.0.attention.attention.query.weight" in renamed
    assert "decoder.decoder_layers.0.output.dense.weight" in renamed
    return renamed


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    assert expected.dtype == torch.float32 and expected.abs().max() > 0.1  # else nothing is compared
    return bool((found - expected).abs().max() <= 1e-5)


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
@torch.no_grad()
def test_features_predictions_and_loss_are_those_of_transformers(sizes, norm_pix):
    peer = vitmae(**SIZES[sizes], norm_pix_loss=norm_pix, mask_ratio=0.75)
    images, model = images_for(peer), ours(peer)
    hub.load_pretraining(model, peer.state_dict())
    length = model.encoder.patch_embed.num_patches
    noise = torch.rand(2, length, generator=torch.Generator().manual_seed(2))
    theirs = peer(images, noise=noise)
    mask = Mask.from_masked(theirs.mask.bool())
    output = model(images[:, None], mask=mask)
    assert close(output.pred, theirs.logits)
    assert theirs.loss > 0.1 and abs(output.loss_rec - theirs.loss) <= 1e-5 and output.loss == output.loss_rec

    seen = peer.vit(images, noise=noise)
    kept = seen.ids_restore.argsort(dim=1)[:, : length // 4].argsort(dim=1)  # transformers leaves them in random order
    tokens = seen.last_hidden_state
    ordered = tokens[:, 1:].gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))
    found, _ = model.encode(images[:, None], mask)
    assert close(found[:, 1:], ordered) and close(found[:, 0], tokens[:, 0])


@pytest.mark.parametrize("layout", ["whole", "as transformers 4", "encoder", "encoder of 4", "lightning", "file", "compiled"])
@torch.no_grad()
def test_an_encoder_is_read_from_every_layout(layout, tmp_path):
    peer = vitmae(mask_ratio=0.0)
    images, vit = images_for(peer), ours(peer).encoder
    whole = peer.state_dict()
    old = names_of_4(whole)
    source: Any = {
        "whole": whole,
        "as transformers 4": old,
        "encoder": peer.vit.state_dict(),
        "encoder of 4": {name[4:]: value for name, value in old.items() if name.startswith("vit.")},
        "lightning": {f"model.{name}": value for name, value in old.items()},
        "compiled": {f"_orig_mod.{name}": value for name, value in whole.items()},
        "file": tmp_path / "file.ckpt",
    }[layout]
    torch.save({"state_dict": {f"net.{name}": value for name, value in whole.items()}}, tmp_path / "file.ckpt")
    hub.load_encoder(vit, source)
    length = vit.patch_embed.num_patches
    expected = peer.vit(images, noise=torch.arange(length).expand(2, -1) / length).last_hidden_state
    assert close(vit.forward_features(images), expected)
    if "encoder" not in layout:
        model = ours(peer)
        hub.load_pretraining(model, source)
        assert torch.equal(model.decoder.head.weight, peer.decoder.decoder_pred.weight)
        query = model.decoder.blocks[0].attn.qkv.weight.chunk(3)[0]
        assert torch.equal(query, whole["decoder.decoder_layers.0.attention.q_proj.weight"])
    else:
        with pytest.raises(WeightsError, match="use load_encoder for an encoder"):
            hub.load_pretraining(ours(peer), source)


@torch.no_grad()
def test_the_positions_are_those_of_the_weights_and_equal_to_ours_where_they_are_mae_s():
    peer, vit = vitmae(), timm.create_model("mvmae_vit_tiny_patch16", img_size=32, patch_size=8, embed_dim=48, num_heads=4)
    assert (vit.pos_embed - table(48, 4)).abs().max() <= 1e-6
    embeddings = peer.vit.embeddings
    for part in (embeddings.patch_embeddings.projection, *embeddings.parameters()):
        part._is_hf_initialized = False
    embeddings.initialize_weights()  # what building from a config leaves out
    assert (vit.pos_embed - embeddings.position_embeddings).abs().max() <= 1e-6
    model, own = ours(peer), torch.randn(1, 17, 48)
    hub.load_encoder(model.encoder, {**peer.state_dict(), "vit.embeddings.position_embeddings": own})
    assert torch.equal(model.encoder.pos_embed, own)


@pytest.mark.parametrize("kind", ["zeros", "moved", "class token", "swapped"])
def test_positions_of_the_decoder_that_are_not_the_fixed_ones_are_refused(kind):
    peer, positions = vitmae(), table(32, 4)
    changed = {
        "zeros": torch.zeros(1, 17, 32),
        "moved": positions + 0.01,
        "class token": positions.index_fill(1, torch.tensor([0]), 0.5),
        "swapped": torch.cat(positions.chunk(2, dim=2)[::-1], dim=2),
    }[kind]
    hub.load_pretraining(ours(peer), peer.state_dict())
    cause = "square grid, got zeros, as in a ViTMAE that was built" if kind == "zeros" else "square grid: load its encoder"
    with pytest.raises(WeightsError, match=f"decoder_pos_embed must be the fixed sine-cosine table of a {cause}"):
        hub.load_pretraining(ours(peer), peer.state_dict() | {"decoder.decoder_pos_embed": changed})


@torch.no_grad()
def test_the_epsilon_alone_is_the_encoder_s_own():
    """With timm's 1e-6 an encoder differs from transformers' 1e-12 as much as the definition of the norm says."""
    peer = vitmae(mask_ratio=0.0)
    images, vit = (
        images_for(peer),
        timm.create_model("mvmae_vit_tiny_patch16", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, mlp_ratio=2),
    )
    hub.load_encoder(vit, peer.state_dict())
    assert vit.norm.eps == 1e-6 and peer.config.layer_norm_eps == 1e-12
    for module in peer.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.forward = lambda x, m=module: layer_norm(x, x.shape[-1:], m.weight, m.bias, 1e-6)
    expected = peer.vit(images, noise=torch.arange(16).expand(2, -1) / 16).last_hidden_state
    assert close(vit.eval().forward_features(images), expected)


def test_a_dictionary_with_one_tensor_missing_is_refused_by_name():
    peer = vitmae()
    model = ours(peer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    filled = ours(peer)
    hub.load_pretraining(filled, peer.state_dict())
    loaded = filled.state_dict()
    for names in (peer.state_dict(), names_of_4(peer.state_dict())):
        for left_out in names:
            if left_out == "decoder.decoder_pos_embed":  # fixed: ours has it anyway
                continue
            weights = {name: value for name, value in names.items() if name != left_out}
            with pytest.raises(WeightsError) as error:
                hub.load_pretraining(model, weights)
            message = str(error.value)
            assert "\n" not in message and message.startswith("the state dict")
            part = re.search(r"(query|key|value|q_proj|k_proj|v_proj)\.(weight|bias)", left_out)
            if part:
                missing = {"q": "query", "k": "key", "v": "value"}[part[1][0]]
                assert f"no {missing}" in message and left_out[: part.start()] in message
            else:
                (missing,) = re.findall(r"1 missing \((\S+)\);", message)
                missing = f"encoder.{missing}" if left_out.startswith("vit.") else missing
                assert torch.equal(loaded[missing], names[left_out])
            if left_out.startswith("vit."):
                with pytest.raises(WeightsError):
                    hub.load_encoder(model.encoder, weights)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_of_another_model_are_refused_in_one_line(tmp_path):
    config = {**ENCODER, "num_channels": 3}
    dino = transformers.Dinov2Model(transformers.Dinov2Config(**{k: v for k, v in config.items() if k != "intermediate_size"}))
    bert = transformers.BertModel(
        transformers.BertConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96, vocab_size=9)
    )
    odd = vitmae().state_dict()
    odd["vit.layers.0.attention.k_proj.weight"] = torch.randn(48, 40)
    vit = ours(vitmae()).encoder
    for source in (dino.state_dict(), bert.state_dict(), odd, {"x": 3}, {}):
        with pytest.raises(WeightsError, match=r"^the state dict") as error:
            hub.load_encoder(vit, source)
        assert "\n" not in str(error.value)
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    (tmp_path / "config.json").write_text('{"model_type": "vit_mae"}')
    with pytest.raises(WeightsError, match=r"model\.safetensors \(3 bytes\) is cut or damaged"):
        hub.load_encoder(vit, tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model of one channel, and the folder that transformers' save_pretrained wrote."""
    folder = tmp_path_factory.mktemp("saved") / "vitmae"
    peer = vitmae(num_channels=1, mask_ratio=0.0, layer_norm_eps=1e-6)
    peer.save_pretrained(folder)
    return peer, folder


@pytest.mark.parametrize(
    "way", ["script", "adapt", "create_model", "load_encoder", "file", "random", "encoder alone", "overlay"]
)
@torch.no_grad()
def test_a_folder_of_save_pretrained_tells_architecture_and_weights(way, saved, tmp_path):
    peer, folder = saved
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "in_chans": 1}
    if way == "encoder alone":
        peer.vit.save_pretrained(tmp_path)
    ways = {
        "script": lambda: load_backbone(str(folder), drop_path_rate=0.1),
        "adapt": lambda: start_encoder(str(folder), pretrained=True, in_chans=1),
        "create_model": lambda: mvmae.create_model(f"local-dir:{folder}", pretrained=True),
        "load_encoder": lambda: ours(peer).encoder,
        "file": lambda: load_backbone(str(folder / "model.safetensors")),
        "random": lambda: load_backbone(f"random:{folder}"),
        "encoder alone": lambda: load_backbone(f"local-dir:{tmp_path}"),
        "overlay": lambda: timm.create_model(
            "mvmae_vit_tiny_patch16", pretrained=True, pretrained_cfg_overlay={"file": f"{folder}/model.safetensors"}, **sizes
        ),
    }
    vit: Any = ways[way]().eval()
    if way == "load_encoder":
        hub.load_encoder(vit, folder)
    images = images_for(peer)
    expected = peer.vit(images, noise=torch.arange(16).expand(2, -1) / 16).last_hidden_state
    assert (len(vit.blocks), vit.embed_dim, vit.patch_embed.patch_size, vit.blocks[0].attn.num_heads) == (2, 48, (8, 8), 4)
    assert close(vit.forward_features(images), expected) == (way != "random")
    if way == "load_encoder":
        model, mask = ours(peer), Mask.from_masked(torch.zeros(2, 16, dtype=torch.bool))
        hub.load_pretraining(model, f"local-dir:{folder}")
        tokens = peer.vit(images, noise=torch.arange(16).expand(2, -1) / 16)
        assert close(model(images[:, None], mask=mask).pred, peer.decoder(tokens.last_hidden_state, tokens.ids_restore).logits)
    if way == "script":
        assert starting_weights(vit, str(folder))["license"] == "unknown"
        hub.export(vit, tmp_path / "exported", mean=[0.5], std=[0.5])
        again: Any = timm.create_model(f"local-dir:{tmp_path / 'exported'}", pretrained=True).eval()
        assert torch.equal(again.forward_features(images), vit.forward_features(images))


@torch.no_grad()
def test_a_repository_of_a_vitmae_is_a_model_too(saved, tmp_path):
    peer, folder = saved
    images = images_for(peer)
    safetensors.torch.save_file({"images": images}, tmp_path / "images.safetensors")
    code = f"""
import sys
import mvmae
sys.path.append({str(EXAMPLES)!r})
from tasks.models import load_backbone
features = mvmae.create_model("hf-hub:me/vitmae", pretrained=True).eval().forward_features(images)
assert torch.equal(load_backbone("hf-hub:me/vitmae").eval().forward_features(images), features)
"""
    with Hub() as server:
        server.repos["me/vitmae"] = hub_repo(folder)
        found = features(code, tmp_path, server.endpoint, tmp_path / "images.safetensors")
    expected = peer.vit(images, noise=torch.arange(16).expand(2, -1) / 16).last_hidden_state
    assert close(found, expected)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": "48"}, "hidden_size must be a positive integer, got '48'"),
    ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
    ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer, got True"),
    ({"image_size": [32, -8]}, "image_size must be a positive integer"),
    ({"num_hidden_layers": 10**6}, "depth must be at most 1000"),
    ({"hidden_act": "relu"}, "hidden_act must be 'gelu', got 'relu'"),
    ({"num_attention_heads": 7}, "no model can be built|cannot be built|cannot be loaded"),
    ({"model_type": "vit"}, "architecture must be a str|holds no model"),
]


@pytest.mark.parametrize("change, cause", CONFIGS, ids=lambda value: str(value)[:40])
def test_f66_a_config_of_no_such_encoder_is_refused_in_one_line(change, cause, saved, tmp_path):
    config = json.loads((saved[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    for call in (lambda: mvmae.create_model(f"local-dir:{tmp_path}"), lambda: load_backbone(str(tmp_path))):
        with pytest.raises((WeightsError, Stop), match=cause) as error:
            call()
        assert "\n" not in str(error.value)


def test_channels_and_positions_of_a_folder_are_adapted_as_timm_does(saved, tmp_path):
    vit: Any = load_backbone(str(saved[1]), image_size=48)
    assert vit.pos_embed.shape == (1, 37, 48)
    with pytest.raises(WeightsError, match="is for 1 channels, the encoder for 3: .*weights of 3 channels alone") as error:
        start_encoder(str(saved[1]), pretrained=True)
    assert "\n" not in str(error.value)
    peer = vitmae()
    peer.save_pretrained(tmp_path)
    grey: Any = start_encoder(str(tmp_path), pretrained=True, in_chans=1)
    weight = peer.vit.embeddings.patch_embeddings.projection.weight
    assert torch.allclose(grey.patch_embed.proj.weight, weight.sum(dim=1, keepdim=True), atol=1e-6)
