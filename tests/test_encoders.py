"""The encoders in timm: what timm promises of its models, the paper's initialisation, and checkpoints of other kinds."""

import copy
import importlib.util
import logging
import pickle
from typing import Any

import numpy
import pytest
import safetensors.torch
import timm
import torch
from timm.models._hub import load_state_dict_from_path
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch import nn

import mvmae
from mvmae.checkpoints import checkpoint_filter
from mvmae.encoders import TIMM_NAMES
from mvmae.weights import WEIGHTS_FILE, WeightsError, locate, read_weights

TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3}


def tiny(name: str = "mvmae_vit_tiny_patch16", **kwargs: Any) -> Any:
    size = 28 if "patch14" in name else 32
    return timm.create_model(name, **(TINY | {"img_size": size} | kwargs)).eval()


def images(model: Any, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)


@pytest.fixture(params=TIMM_NAMES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


@pytest.mark.parametrize(("name", "plain"), TIMM_NAMES.items())
def test_an_encoder_has_the_parameters_and_the_outputs_of_timms_own(name, plain):
    ours = timm.create_model(name, device="meta")
    theirs = timm.create_model(plain, device="meta", num_classes=0, global_pool="avg", fc_norm=False)
    shapes = [{key: value.shape for key, value in vit.state_dict().items()} for vit in (ours, theirs)]
    assert shapes[0] == shapes[1]
    ours = tiny(name)
    theirs = tiny(plain, num_classes=0, global_pool="avg", fc_norm=False)
    theirs.load_state_dict(ours.state_dict())
    x = images(ours)
    assert torch.equal(ours(x), theirs(x))
    assert type(ours).forward is VisionTransformer.forward


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


def test_meta_device_then_init_weights_equals_building_in_place():
    vit = tiny(device="meta")
    assert all(parameter.is_meta for parameter in vit.parameters())
    vit.to_empty(device="cpu")
    vit.init_weights()
    assert torch.equal(vit.pos_embed, tiny().pos_embed)
    assert all(value.isfinite().all() for value in vit.state_dict().values())


def test_the_classifier_is_reset_and_given(model):
    assert model.num_classes == 0
    assert isinstance(model.get_classifier(), nn.Identity)
    x = images(model)
    features = model(x)
    model.reset_classifier(7)
    assert model.get_classifier().weight.shape == (7, 48)
    assert torch.allclose(model(x), model.get_classifier()(features), atol=1e-6)
    model.reset_classifier(0, "token")
    assert torch.equal(model(x), model.forward_features(x)[:, 0])


def test_forward_intermediates_are_the_blocks_outputs(model):
    x = images(model)
    final, maps = model.forward_intermediates(x, indices=[0, 1], norm=False)
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for block, found in zip(model.blocks, maps, strict=True):
        tokens = block(tokens)
        assert torch.allclose(found.flatten(2).mT, tokens[:, 1:], atol=1e-6)
    assert torch.allclose(final, model.forward_features(x), atol=1e-6)


def test_features_only_gives_maps(model):
    name = model.pretrained_cfg["architecture"]
    backbone = tiny(name, features_only=True, out_indices=[0, 1])
    backbone.model.load_state_dict(model.state_dict(), strict=False)
    x = images(model)
    assert backbone.feature_info.channels() == [48, 48]
    assert backbone.feature_info.reduction() == [model.patch_embed.patch_size[0]] * 2
    for found, expected in zip(backbone(x), model.forward_intermediates(x, [0, 1], intermediates_only=True), strict=True):
        assert torch.equal(found, expected)


def test_layer_decay_groups_every_parameter_by_its_depth(model):
    model.reset_classifier(5)
    groups = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5).param_groups
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert len(scale) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    named = {name: scale[id(parameter)] for name, parameter in model.named_parameters()}
    assert named["patch_embed.proj.weight"] == named["pos_embed"] == 0.5**3
    assert named["blocks.0.mlp.fc1.weight"] == 0.5**2
    assert named["blocks.1.mlp.fc1.weight"] == 0.5
    assert named["head.weight"] == 1.0
    assert set(model.group_matcher()) == {"stem", "blocks"}


def test_gradient_checkpointing_changes_no_gradient():
    vit, calls = tiny().train(), []
    x = images(vit)
    vit(x).square().mean().backward()
    plain = {name: parameter.grad for name, parameter in vit.named_parameters()}
    vit.zero_grad(set_to_none=True)
    vit.set_grad_checkpointing()
    vit.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    vit(x).square().mean().backward()
    assert len(calls) == 2  # forward, and again for the backward pass
    assert plain and all(torch.equal(parameter.grad, plain[name]) for name, parameter in vit.named_parameters())


def test_a_copy_and_a_pickle_give_the_same(model):
    x = images(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert other.pos_embed.data_ptr() != model.pos_embed.data_ptr()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_stays_near_full(dtype, tolerance):
    vit = tiny()
    x = images(vit)
    full = vit(x)
    half = vit.to(dtype)(x.to(dtype))
    assert half.dtype is dtype
    assert torch.allclose(half.float(), full, atol=tolerance)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_torch_compile_takes_the_whole_graph(backend):
    vit = tiny()
    x = images(vit)
    assert torch.allclose(torch.compile(vit, backend=backend, fullgraph=True)(x), vit(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torch_export_and_torchscript_give_the_same():
    vit = tiny(num_classes=5)
    x = images(vit)
    assert torch.allclose(torch.export.export(vit, (x,)).module()(x), vit(x), atol=1e-6)
    assert torch.allclose(torch.jit.script(vit)(x), vit(x), atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="onnxscript is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_gives_the_same(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    vit = tiny(num_classes=5)
    x = images(vit)
    torch.onnx.export(vit, (x,), tmp_path / "vit.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "vit.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), vit(x), atol=1e-5)


def test_naflex_has_the_positions_too():
    vit = tiny(use_naflex=True)
    assert type(vit).__name__ == "NaFlexVit"
    assert torch.equal(vit.embeds.pos_embed.flatten(1, 2), tiny().pos_embed[:, 1:])


def test_unknown_arguments_raise():
    with pytest.raises(TypeError, match="mask_ratio"):
        tiny(mask_ratio=0.5)


def test_the_cfgs_claim_no_weights_and_say_how_to_load_ones_own():
    assert len(timm.list_models("mvmae_vit_*")) == len(TIMM_NAMES) == 5
    assert timm.list_models("mvmae_vit_*", pretrained=True) == []
    for name in timm.list_models("mvmae_vit_*", include_tags=True):
        cfg = timm.get_pretrained_cfg(name)
        assert (cfg.license, cfg.input_size, cfg.interpolation, cfg.crop_pct) == ("apache-2.0", (3, 224, 224), "bicubic", 0.875)
        assert (cfg.tag, cfg.num_classes, cfg.description) == ("untrained", 0, None)
        with pytest.raises(WeightsError) as error:
            timm.create_model(name, pretrained=True)
        assert "\n" not in str(error.value)
        for part in (name.split(".")[0], "no weights are published", "dict(file=...)", "local-dir:", "hf-hub:"):
            assert part in str(error.value)


def mae_checkpoint(vit: Any) -> dict[str, Any]:
    """Builds a file in the layout of MAE's checkpoints, with the names read off its code."""
    decoder = {"decoder_embed.weight": torch.randn(32, 48), "decoder_pos_embed": torch.randn(1, 5, 32)}
    return {"model": {**vit.state_dict(), "mask_token": torch.randn(1, 1, 32), **decoder}, "epoch": 3}


@pytest.mark.parametrize("layout", ["timm", "mae", "run", "state_dict"])
def test_a_file_of_any_layout_gives_its_encoder(layout, tmp_path):
    vit = tiny()
    if layout == "run":
        whole = mvmae.MultiViewMAE(vit, decoder_dim=32, decoder_depth=1, decoder_heads=4, mask_ratio=0.5)
        content = {"model": whole.state_dict(), "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}, "step": 3}
    else:
        weights = vit.state_dict()
        content = {"timm": weights, "mae": mae_checkpoint(vit), "state_dict": {"state_dict": weights}}[layout]
    torch.save(content, tmp_path / "file.pth")
    loaded = tiny(pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "file.pth")})
    x = images(vit)
    assert torch.equal(loaded(x), vit(x))


@pytest.mark.parametrize("kwargs", [{"in_chans": 1}, {"img_size": 48}, {"img_size": (32, 64)}, {"patch_size": 8}])
def test_another_input_is_adapted_as_timm_does(kwargs, tmp_path):
    torch.manual_seed(1)
    safetensors.torch.save_file(tiny().state_dict(), tmp_path / "file.safetensors")
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "file.safetensors")}}
    ours = tiny(**options, **kwargs)
    options["pretrained_cfg_overlay"] = {**options["pretrained_cfg_overlay"], "num_classes": 0, "custom_load": False}
    theirs = tiny("vit_tiny_patch16_224", **options, **kwargs, global_pool="avg", fc_norm=False)
    x = images(ours)
    assert x.shape[1:] != (3, 32, 32) or kwargs == {"patch_size": 8}
    assert torch.equal(ours(x), theirs(x))


def test_a_fine_tuned_head_is_kept_unless_another_number_of_classes_is_asked_for(tmp_path, caplog):
    vit = tiny(num_classes=5)
    safetensors.torch.save_file(vit.state_dict(), tmp_path / "file.safetensors")
    overlay = {"file": str(tmp_path / "file.safetensors")}
    x = images(vit)
    assert torch.equal(tiny(pretrained=True, pretrained_cfg_overlay=overlay)(x), vit(x))
    with caplog.at_level(logging.WARNING, "mvmae"):
        other = tiny(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=9)
    assert other.head.weight.shape == (9, 48)
    assert torch.equal(other.forward_features(x), vit.forward_features(x))
    assert caplog.messages == ["the checkpoint's head of 5 classes is left out: the model has 9"]


def test_a_file_of_other_channels_gives_a_model_of_as_many(tmp_path):
    vit = tiny(in_chans=5)
    safetensors.torch.save_file(vit.state_dict(), tmp_path / "file.safetensors")
    loaded = tiny(pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "file.safetensors")})
    x = images(vit)
    assert torch.equal(loaded(x), vit(x))


def test_the_final_norm_moves_where_the_model_has_it(tmp_path):
    vit = tiny()
    nn.init.normal_(vit.norm.weight)
    safetensors.torch.save_file(vit.state_dict(), tmp_path / "file.safetensors")
    pooled = tiny(pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "file.safetensors")}, fc_norm=True)
    assert torch.equal(pooled.fc_norm.weight, vit.norm.weight)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda w: w.pop("blocks.1.mlp.fc2.bias"), r"1 missing \(blocks.1.mlp.fc2.bias\)"),
        (lambda w: w.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
        (lambda w: w.update({"norm.bias": torch.zeros(7)}), r"norm.bias is \(7,\) instead of \(48,\)"),
        (lambda w: w.update({"pos_embed": torch.zeros(1, 12, 48)}), "cannot be resized"),
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
        tiny(pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "file.safetensors")}, num_classes=num_classes)
    assert str(tmp_path / "file.safetensors") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_filtered_checkpoint_is_not_changed_itself():
    weights = mae_checkpoint(tiny())
    before = {key: value.clone() for key, value in weights["model"].items()}
    checkpoint_filter(weights, tiny(img_size=48))
    assert list(weights["model"]) == list(before)
    assert all(torch.equal(weights["model"][key], value) for key, value in before.items())


@pytest.mark.parametrize("safe", [False, True, "both"])
def test_f49_what_timm_saves_comes_back(safe, tmp_path):
    source = tiny(num_classes=5, in_chans=4)
    timm.models.save_for_hf(source, str(tmp_path), safe_serialization=safe)
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


def test_positions_are_non_zero_after_build_load_and_resize(tmp_path):
    from safetensors.torch import save_file

    built = tiny()
    save_file(built.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"file": str(tmp_path / "weights.safetensors"), "custom_load": False}
    loaded = tiny(pretrained=True, pretrained_cfg_overlay=overlay)
    larger = tiny(pretrained=True, pretrained_cfg_overlay=overlay, img_size=(48, 64))
    resized = tiny()
    resized.set_input_size(img_size=(48, 64))
    assert torch.equal(loaded.pos_embed, built.pos_embed)
    torch.testing.assert_close(larger.pos_embed, resized.pos_embed)
    for vit in (built, loaded, larger, resized):
        assert (vit.pos_embed[0, 1:].norm(dim=1) > 0.1).all() and vit.pos_embed[0, 0].abs().max() == 0
