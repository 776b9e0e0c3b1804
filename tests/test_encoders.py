"""The encoders in timm: the same model, the paper's initialisation, and checkpoints of other kinds.

What timm promises of its models, `timm_tests.py` tests by timm's own tests.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import timm
import torch
from timm.models._hub import load_state_dict_from_path
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import mvmae
from mvmae import hub
from mvmae.checkpoints import checkpoint_filter
from mvmae.encoders import TIMM_NAMES
from mvmae.weights import WEIGHTS_FILE, WeightsError, locate, read_weights

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3}


def tiny(name: str = "mvmae_vit_tiny_patch16", **kwargs: Any) -> Any:
    size = 28 if "patch14" in name else 32
    return timm.create_model(name, **(TINY | {"img_size": size} | kwargs)).eval()


def images(model: Any, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)


def save(vit: Any, folder: Path) -> Path:
    safetensors.torch.save_file(vit.state_dict(), folder / "file.safetensors")
    return folder / "file.safetensors"


def from_file(path: Path, **kwargs: Any) -> Any:
    """Builds ours with the weights of a file, as timm loads them."""
    return tiny(pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs)


@pytest.mark.parametrize(("name", "plain"), TIMM_NAMES.items())
def test_an_encoder_has_the_parameters_and_the_outputs_of_timms_own(name, plain):
    sizes = {"img_size": 64, "patch_size": 8, "depth": 4} if "micro" in name else {}
    ours = timm.create_model(name, device="meta")
    theirs = timm.create_model(plain, device="meta", num_classes=0, global_pool="avg", fc_norm=False, **sizes)
    shapes = [{key: value.shape for key, value in vit.state_dict().items()} for vit in (ours, theirs)]
    assert shapes[0] == shapes[1]
    ours = tiny(name)
    theirs = tiny(
        plain, num_classes=0, global_pool="avg", fc_norm=False, **{key: sizes[key] for key in sizes if key == "patch_size"}
    )
    theirs.load_state_dict(ours.state_dict())
    x = images(ours)
    assert torch.equal(ours(x), theirs(x))
    assert type(ours).forward is VisionTransformer.forward
    own = {name for name in vars(type(ours)) if not name.startswith("__")}
    assert own == {"init_weights"}, "initialisation alone"


def test_weights_and_positions_start_as_in_the_paper():
    vit = tiny(embed_dim=192)
    bound = (6 / (192 + 4 * 192)) ** 0.5
    assert 0.98 * bound < vit.blocks[0].mlp.fc1.weight.abs().max() <= bound
    assert vit.blocks[0].mlp.fc1.bias.abs().max() == 0
    bound = (6 / (192 + 3 * 16**2)) ** 0.5
    assert 0.98 * bound < vit.patch_embed.proj.weight.abs().max() <= bound
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert vit.pos_embed[0, 0].abs().max() == 0
    assert vit.pos_embed[0, 2, 0].item() == pytest.approx(torch.tensor(1.0).sin().item(), abs=1e-6)  # column 1
    assert vit.pos_embed[0, 2, 96:144].abs().max() == 0  # row 0


def test_naflex_has_the_positions_too():
    vit = tiny(use_naflex=True)
    assert type(vit).__name__ == "NaFlexVit"
    assert torch.equal(vit.embeds.pos_embed.flatten(1, 2), tiny().pos_embed[:, 1:])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_smal_patch16_224", "timm has no model 'vit_smal_patch16_224', .* did you mean vit_small_patch16_224"),
        ("mvmae_vit_micro_patch8_64.imagenet", "it has mvmae_vit_micro_patch8_64.cifar10$"),
        ("runs/nowhere", "there is no folder runs/nowhere"),
        ("local-dir:nowhere", "there is no folder nowhere"),
        ("file.pth", r"file.pth is a file: name its architecture, with pretrained_cfg_overlay=dict\(file='file.pth'\)"),
    ],
)
def test_a_name_that_does_not_exist_is_refused_with_what_there_is(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.pth").touch()
    with pytest.raises(WeightsError, match=message):
        mvmae.create_model(name)


def test_the_cfgs_claim_no_weights_and_say_how_to_load_ones_own():
    assert len(timm.list_models("mvmae_vit_*")) == len(TIMM_NAMES) == 6
    for name in timm.list_models("mvmae_vit_*_patch1?", include_tags=True):
        cfg = timm.get_pretrained_cfg(name)
        assert (cfg.license, cfg.input_size, cfg.interpolation, cfg.crop_pct) == ("apache-2.0", (3, 224, 224), "bicubic", 0.875)
        assert (cfg.tag, cfg.num_classes, cfg.description) == ("untrained", 0, None)
        with pytest.raises(WeightsError) as error:
            timm.create_model(name, pretrained=True)
        assert "\n" not in str(error.value)
        for part in (
            name.split(".")[0],
            "mvmae_vit_micro_patch8_64",
            "vit_base_patch16_224.mae",
            "dict(file=...)",
            "local-dir:",
            "hf-hub:",
        ):
            assert part in str(error.value)


def mae_checkpoint(vit: Any) -> dict[str, Any]:
    """Builds a file in the layout of MAE's checkpoints, with the names read off its code."""
    decoder = {"decoder_embed.weight": torch.randn(32, 48), "decoder_pos_embed": torch.randn(1, 5, 32)}
    return {"model": {**vit.state_dict(), "mask_token": torch.randn(1, 1, 32), **decoder}, "epoch": 3}


def run_checkpoint(vit: Any) -> dict[str, Any]:
    model = mvmae.MultiViewMAE(vit, decoder_dim=32, decoder_depth=1, decoder_heads=4, mask_ratio=0.5)
    return {"model": model.state_dict(), "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}, "step": 3}


LAYOUTS = {"mae": mae_checkpoint, "run": run_checkpoint, "state_dict": lambda vit: {"state_dict": vit.state_dict()}}


@pytest.mark.parametrize("layout", [*LAYOUTS, "safetensors", "exported"])
def test_a_file_of_any_layout_gives_its_encoder(layout, tmp_path):
    vit, path = tiny(), tmp_path / "file.pth"
    if layout == "exported":
        path = hub.export(mvmae.MultiViewMAE(vit, decoder_dim=32, decoder_heads=4, mask_ratio=0.5), tmp_path) / WEIGHTS_FILE
    elif layout == "safetensors":
        path = save(vit, tmp_path)
    else:
        torch.save(LAYOUTS[layout](vit), path)
    x, plain = images(vit), tiny("vit_tiny_patch16_224", num_classes=0, global_pool="avg", fc_norm=False)
    hub.load_encoder(plain, path)
    assert torch.equal(plain(x), vit(x))
    assert torch.equal(from_file(path)(x), vit(x))


@pytest.mark.parametrize(
    "kwargs", [{"in_chans": 1}, {"img_size": 48}, {"img_size": (32, 64), "in_chans": 1}, {"patch_size": 8}, {"in_chans": 5}]
)
def test_another_input_is_adapted_as_timm_does(kwargs, tmp_path):
    torch.manual_seed(1)
    path = save(tiny(), tmp_path)
    overlay = {"file": str(path), "num_classes": 0, "custom_load": False}
    ours, loaded = from_file(path, **kwargs), tiny(**kwargs)
    hub.load_encoder(loaded, path)
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay, "global_pool": "avg", "fc_norm": False}
    theirs = tiny("vit_tiny_patch16_224", **options, **kwargs)
    x = images(ours)
    assert torch.equal(ours(x), theirs(x)) and torch.equal(loaded(x), theirs(x))


def test_a_fine_tuned_head_is_kept_unless_another_number_of_classes_is_asked_for(tmp_path, caplog):
    vit = tiny(num_classes=5)
    path, x = save(vit, tmp_path), images(vit)
    assert torch.equal(from_file(path)(x), vit(x))
    with caplog.at_level(logging.WARNING, "mvmae"):
        other = from_file(path, num_classes=9)
    assert other.head.weight.shape == (9, 48)
    assert torch.equal(other.forward_features(x), vit.forward_features(x))
    assert len(caplog.messages) == 1 and "5 classes is left out: the model has 9" in caplog.text


def test_a_file_of_other_channels_gives_a_model_of_as_many_and_the_norm_moves_where_the_model_has_it(tmp_path):
    vit = tiny(in_chans=5)
    nn.init.normal_(vit.norm.weight)
    path, x = save(vit, tmp_path), images(vit)
    assert torch.equal(from_file(path)(x), vit(x))
    assert torch.equal(from_file(path, fc_norm=True).fc_norm.weight, vit.norm.weight)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda w: w.pop("blocks.1.mlp.fc2.bias"), r"1 missing \(blocks.1.mlp.fc2.bias\)"),
        (lambda w: w.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
        (lambda w: w.update({"norm.bias": torch.zeros(7)}), r"norm.bias is \(7,\) instead of \(48,\)"),
        (lambda w: w.update({"pos_embed": torch.zeros(1, 12, 48)}), "pos_embed is .1, 12, 48."),
        (lambda w: w.update({"pos_embed": torch.zeros(1, 5, 47)}), r"pos_embed is \(1, 5, 47\) instead of \(1, 5, 48\)"),
        (lambda w: [w.pop(name) for name in list(w)[2:]], r"28 missing \(.*, \.\.\.\)"),
    ],
)
@pytest.mark.parametrize("num_classes", [0, 5])  # timm's own loader is not strict where it differs from the cfg's
def test_a_wrong_file_names_the_keys_in_one_line(change, cause, num_classes, tmp_path):
    weights = dict(tiny().state_dict())
    change(weights)
    safetensors.torch.save_file(weights, tmp_path / "file.safetensors")
    with pytest.raises(WeightsError, match=cause) as error:
        from_file(tmp_path / "file.safetensors", num_classes=num_classes)
    assert str(tmp_path / "file.safetensors") in str(error.value) and "\n" not in str(error.value)


def test_a_filtered_checkpoint_is_not_changed_itself():
    weights = mae_checkpoint(tiny())
    before = {key: value.clone() for key, value in weights["model"].items()}
    checkpoint_filter(weights, tiny(img_size=48))
    assert list(weights["model"]) == list(before)
    assert all(torch.equal(weights["model"][key], value) for key, value in before.items())


def test_a_state_dict_has_nothing_to_do_with_a_config_in_the_current_folder(tmp_path, monkeypatch):
    weights, loaded = tiny(img_size=64).state_dict(), [tiny(), tiny()]
    hub.load_encoder(loaded[0], weights)
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text('{"inputs": {"size": [16, 256]}}')  # as many patches
    hub.load_encoder(loaded[1], weights)
    assert torch.equal(loaded[0].pos_embed, loaded[1].pos_embed)


@pytest.mark.parametrize("safe", [False, True, "both"])
def test_f49_what_timm_saves_comes_back(safe, tmp_path):
    source = tiny(num_classes=5, in_chans=4)
    timm.models.save_for_hf(source, str(tmp_path), safe_serialization=safe)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "vit_tiny_patch16_224"  # without mvmae too
    for create in (timm.create_model, mvmae.create_model):
        model = create(f"local-dir:{tmp_path}", pretrained=True).eval()
        x = images(source)
        assert torch.equal(model(x), source(x))
        assert "state_dict" not in model.pretrained_cfg and model.pretrained_cfg["source"] == "local-dir"
    named = {"pretrained_cfg_overlay": {"source": "local-dir", "file": str(tmp_path), "num_classes": 5}}
    assert torch.equal(tiny(pretrained=True, in_chans=4, num_classes=5, **named)(x), source(x))
    maps = tiny(pretrained=True, in_chans=4, features_only=True, out_indices=2, **named)
    assert torch.equal(maps.model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def test_f49_a_folder_with_several_files_gives_the_one_that_timm_takes(tmp_path):
    names = ["z.bin", "z.pth", "a.pth", "z.safetensors", "model.pth", "pytorch_model.pth", "pytorch_model.bin", WEIGHTS_FILE]
    for number, name in enumerate(names):  # each is preferred to those before it
        content = {"x": torch.full((1,), float(number))}
        (safetensors.torch.save_file if name.endswith(".safetensors") else torch.save)(content, tmp_path / name)
        assert read_weights(locate(tmp_path, WEIGHTS_FILE)) == load_state_dict_from_path(tmp_path) == content, name


def test_an_original_npz_file_is_read_on_request(tmp_path, monkeypatch):
    numpy.savez(tmp_path / "file.npz", x=numpy.zeros(1))
    overlay = {"file": str(tmp_path / "file.npz")}
    loaded: list[str] = []
    monkeypatch.setattr(VisionTransformer, "load_pretrained", lambda self, path: loaded.append(path))
    tiny(pretrained=True, pretrained_cfg_overlay={**overlay, "custom_load": True})
    assert loaded == [overlay["file"]]
