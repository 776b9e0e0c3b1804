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

transformers = pytest.importorskip("transformers", minversion="5")
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


@torch.no_grad()
def their_features(peer: Any, images: torch.Tensor) -> torch.Tensor:
    """The tokens of transformers' encoder with nothing masked, in the order of the patches."""
    assert peer.config.mask_ratio == 0
    length = (peer.config.image_size // peer.config.patch_size) ** 2
    tokens: torch.Tensor = peer.vit(images, noise=torch.arange(length).expand(2, -1) / length).last_hidden_state
    return tokens


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
    whole, old = peer.state_dict(), names_of_4(peer.state_dict())
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
    assert close(vit.forward_features(images), their_features(peer, images))
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


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (torch.zeros_like, "got zeros, as in a ViTMAE that was built"),
        (lambda table: table + 0.01, "load its encoder"),
        (lambda table: table.index_fill(1, torch.tensor([0]), 0.5), "load its encoder"),  # of the class token
        (lambda table: torch.cat(table.chunk(2, dim=2)[::-1], dim=2), "load its encoder"),  # rows and columns swapped
    ],
)
def test_positions_of_the_decoder_that_are_not_the_fixed_ones_are_refused(change, cause):
    peer, name = vitmae(), "decoder.decoder_pos_embed"
    hub.load_pretraining(ours(peer), peer.state_dict())
    with pytest.raises(WeightsError, match=f"decoder_pos_embed must be the fixed sine-cosine table .*{cause}"):
        hub.load_pretraining(ours(peer), peer.state_dict() | {name: change(peer.state_dict()[name])})


@torch.no_grad()
def test_the_epsilon_alone_is_the_encoder_s_own():
    """With timm's 1e-6 an encoder differs from transformers' 1e-12 as much as the definition of the norm says."""
    peer, sizes = vitmae(mask_ratio=0.0), {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    images, vit = images_for(peer), timm.create_model("mvmae_vit_tiny_patch16", mlp_ratio=2, **sizes).eval()
    hub.load_encoder(vit, peer.state_dict())
    assert vit.norm.eps == 1e-6 and peer.config.layer_norm_eps == 1e-12
    for module in peer.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.forward = lambda x, m=module: layer_norm(x, x.shape[-1:], m.weight, m.bias, 1e-6)
    assert close(vit.forward_features(images), their_features(peer, images))


@pytest.mark.parametrize("names", [dict, names_of_4])
def test_a_dictionary_with_one_tensor_missing_is_refused_by_name(names):
    peer = vitmae()
    model, filled = ours(peer), ours(peer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hub.load_pretraining(filled, peer.state_dict())
    weights = names(peer.state_dict())
    for left_out in weights.keys() - {"decoder.decoder_pos_embed"}:  # that is fixed: ours has it anyway
        rest = {name: value for name, value in weights.items() if name != left_out}
        with pytest.raises(WeightsError, match=r"^the state dict[^\n]*$") as error:
            hub.load_pretraining(model, rest)
        if part := re.search(r"(query|key|value|q_proj|k_proj|v_proj)\.(weight|bias)", left_out):
            missing = {"q": "query", "k": "key", "v": "value"}[part[1][0]]
            assert f"no {missing}" in str(error.value) and left_out[: part.start()] in str(error.value)
        else:
            (missing,) = re.findall(r"1 missing \((\S+)\);", str(error.value))
            missing = f"encoder.{missing}" if left_out.startswith("vit.") else missing
            assert torch.equal(filled.state_dict()[missing], weights[left_out])
        if left_out.startswith("vit."):
            with pytest.raises(WeightsError):
                hub.load_encoder(model.encoder, rest)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_of_another_model_are_refused_in_one_line(tmp_path):
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    dino = transformers.Dinov2Model(transformers.Dinov2Config(image_size=32, patch_size=8, **sizes))
    bert = transformers.BertModel(transformers.BertConfig(intermediate_size=96, vocab_size=9, **sizes))
    odd = vitmae().state_dict() | {"vit.layers.0.attention.k_proj.weight": torch.randn(48, 40)}
    vit = ours(vitmae()).encoder
    for source in (dino.state_dict(), bert.state_dict(), odd, {"x": 3}, {}):
        with pytest.raises(WeightsError, match=r"^the state dict[^\n]*$"):
            hub.load_encoder(vit, source)
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


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "in_chans": 1}
WAYS = {  # given the folder of a whole model and that of its encoder alone
    "script": lambda whole, encoder: load_backbone(str(whole), drop_path_rate=0.1),
    "adapt": lambda whole, encoder: start_encoder(str(whole), pretrained=True, in_chans=1),
    "create_model": lambda whole, encoder: mvmae.create_model(f"local-dir:{whole}", pretrained=True),
    "file": lambda whole, encoder: load_backbone(f"{whole}/model.safetensors"),
    "random": lambda whole, encoder: load_backbone(f"random:{whole}"),
    "encoder alone": lambda whole, encoder: load_backbone(f"local-dir:{encoder}"),
    "overlay": lambda whole, encoder: timm.create_model(
        "mvmae_vit_tiny_patch16", pretrained=True, pretrained_cfg_overlay={"file": f"{whole}/model.safetensors"}, **SMALL
    ),
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_folder_of_save_pretrained_tells_architecture_and_weights(way, saved, tmp_path):
    peer, folder = saved
    peer.vit.save_pretrained(tmp_path)
    vit, images = WAYS[way](folder, tmp_path).eval(), images_for(peer)
    assert (len(vit.blocks), vit.embed_dim, vit.patch_embed.patch_size, vit.blocks[0].attn.num_heads) == (2, 48, (8, 8), 4)
    assert close(vit.forward_features(images), their_features(peer, images)) == (way != "random")


@torch.no_grad()
def test_a_folder_fills_a_model_and_what_starts_from_it_is_exported(saved, tmp_path):
    peer, folder = saved
    images, model, vit = images_for(peer), ours(peer), load_backbone(str(folder)).eval()
    hub.load_encoder(model.encoder, folder)
    assert close(model.encoder.forward_features(images), their_features(peer, images))
    hub.load_pretraining(model, f"local-dir:{folder}")
    nothing_masked, order = Mask.from_masked(torch.zeros(2, 16, dtype=torch.bool)), torch.arange(16).expand(2, -1)
    expected = peer.decoder(their_features(peer, images), order).logits
    assert close(model(images[:, None], mask=nothing_masked).pred, expected)
    assert starting_weights(vit, str(folder))["license"] == "unknown"
    hub.export(vit, tmp_path, mean=[0.5], std=[0.5])
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
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
    assert close(found, their_features(peer, images))


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": "48"}, "hidden_size must be a positive integer, got '48'"),
    ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
    ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer, got True"),
    ({"image_size": [32, -8]}, "image_size must be a positive integer"),
    ({"num_hidden_layers": 10**6}, "depth must be at most 1000"),
    ({"hidden_act": "relu"}, "hidden_act must be 'gelu', got 'relu'"),
    ({"num_attention_heads": 7}, "no model can be built|cannot be built|cannot be loaded"),
    ({"model_type": "bert"}, "are known, got 'bert'"),
]


@pytest.mark.parametrize("change, cause", CONFIGS, ids=lambda value: str(value)[:40])
def test_f66_a_config_of_no_such_encoder_is_refused_in_one_line(change, cause, saved, tmp_path):
    config = json.loads((saved[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    for load in (mvmae.create_model, load_backbone):
        with pytest.raises((WeightsError, Stop), match=cause) as error:
            load(f"local-dir:{tmp_path}")
        assert "\n" not in str(error.value)


def test_channels_and_positions_of_a_folder_are_adapted_as_timm_does(saved, tmp_path):
    vit: Any = load_backbone(str(saved[1]), image_size=(48,))
    assert vit.pos_embed.shape == (1, 37, 48)
    with pytest.raises(WeightsError, match=r"is for 1 channels, the encoder for 3: [^\n]*$"):
        start_encoder(str(saved[1]), pretrained=True)
    peer = vitmae()
    peer.save_pretrained(tmp_path)
    grey: Any = start_encoder(str(tmp_path), pretrained=True, in_chans=1)
    weight = peer.vit.embeddings.patch_embeddings.projection.weight
    assert torch.allclose(grey.patch_embed.proj.weight, weight.sum(dim=1, keepdim=True), atol=1e-6)
