"""examples/tasks/models.py: any model by name, with a head, and written."""

import json
import sys

import pytest
import safetensors.torch
import timm
import torch
from running import EXAMPLES

from mvmae import WeightsError, hub

sys.path.append(str(EXAMPLES))
from engine.signals import Stop
from tasks.models import add_head, load_backbone, save_classifier

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture
def encoder(tmp_path):
    """An encoder, and what a run with it leaves in the folder `run`."""
    model = timm.create_model("mvmae_vit_tiny_patch16", **TINY).eval()
    hub.export(model, tmp_path / "run" / "encoder")
    (tmp_path / "run" / "config.json").write_text('{"data": "sample"}')
    return model


@pytest.mark.parametrize(
    "name", ["run", "run/encoder", "local-dir:run/encoder", "run/encoder/model.safetensors", "local-dir:run"]
)
def test_a_run_a_folder_and_a_file_give_the_same_encoder(encoder, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    assert equal(load_backbone(name).state_dict(), encoder.state_dict())
    assert torch.equal(load_backbone(name).eval()(images), encoder(images))
    untrained = load_backbone(f"random:{name}").state_dict()
    assert {key: value.shape for key, value in untrained.items()} == {k: v.shape for k, v in encoder.state_dict().items()}
    assert not torch.equal(untrained["blocks.0.attn.qkv.weight"], encoder.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize(
    ("arch", "classes"), [("convnext_atto", 5), ("vit_tiny_patch16_224", 1000), ("vit_tiny_patch16_224", 0)]
)
def test_a_lone_file_needs_the_name_of_its_architecture(tmp_path, arch, classes):
    model, file = timm.create_model(arch, num_classes=classes), tmp_path / "x.safetensors"
    safetensors.torch.save_file(model.state_dict(), file)
    loaded = load_backbone(str(file), arch=arch).state_dict()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.items())
    with pytest.raises(Stop, match="does not say its architecture: add --arch"):
        load_backbone(str(file))


@pytest.mark.parametrize("arch", ["convnext_atto", "mvmae_vit_tiny_patch16"])
def test_nothing_is_loaded_half(tmp_path, arch):
    weights = timm.create_model(arch, num_classes=0).state_dict()
    left_out = [name for name in weights if name.endswith("mlp.fc1.weight")][3]
    weights.pop(left_out)
    safetensors.torch.save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=rf"1 missing \({left_out}\)"):
        load_backbone(str(tmp_path / "x.safetensors"), arch=arch)


def test_another_image_size_resizes_positions_and_a_model_without_them_takes_any(encoder, tmp_path):
    larger = load_backbone(str(tmp_path / "run"), image_size=(48,), drop_path_rate=0.1)
    assert larger(torch.randn(1, 3, 48, 48)).shape == (1, 48)
    assert torch.equal(larger.blocks[1].mlp.fc1.weight, encoder.blocks[1].mlp.fc1.weight)
    assert load_backbone("random:convnext_atto", image_size=(48,), no_such_option=1)(torch.randn(1, 3, 48, 48)).ndim == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_smal_patch16_224", "did you mean vit_small_patch16_224"),
        ("random:convnxt_atto", "did you mean convnext_atto"),
        ("vit_base_patch16_224.no_such_tag", "timm has no weights 'vit_base_patch16_224.no_such_tag'"),
        ("vit_small_patch16_224", "cannot be loaded .* --arch vit_small_patch16_224"),  # tests are offline
        ("hf-hub:nobody/nothing", "nobody/nothing is not in the cache"),
        ("local-dir:nowhere", "there is no file or folder nowhere"),
        ("nowhere.safetensors", "there is no file or folder nowhere.safetensors"),
        (".", "holds no model: give"),
        ("waits", "holds no model: the run there has not begun training"),
        ("trains", "holds no model: the run there has not ended"),
    ],
)
def test_what_there_is_not_is_told_in_one_line(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    for run, files in (("waits", [".lock", ".owner"]), ("trains", [".lock", "checkpoint.pt"])):
        (tmp_path / run).mkdir()
        for file in files:
            (tmp_path / run / file).touch()
    with pytest.raises((Stop, WeightsError), match=message) as caught:
        load_backbone(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{}, {"global_pool": "avg"}, {"class_token": False, "global_pool": "avg", "fc_norm": False}]
)
def test_the_head_stands_on_the_normalised_mean_of_the_patch_tokens(tiny_vit, options):
    model = tiny_vit(**options).eval()
    trained = {key: value.clone() for key, value in model.state_dict().items() if "norm." not in key or "blocks" in key}
    for norm in (model.norm, model.fc_norm):
        if isinstance(norm, torch.nn.LayerNorm):
            torch.nn.init.normal_(norm.weight)  # as if trained
    add_head(model, 7, std=0.5)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in trained.items())
    images, prefix = torch.randn(2, 3, 32, 32), model.num_prefix_tokens
    tokens = model.blocks(model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images)))))
    mean = torch.nn.functional.layer_norm(tokens[:, prefix:].mean(1), (48,), eps=model.fc_norm.eps)
    assert torch.allclose(model(images), model.head(mean), atol=1e-5)
    assert model.head.weight.std().item() == pytest.approx(0.5, rel=0.2) and not model.head.bias.any()


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050"])
def test_another_model_keeps_its_way_of_pooling(name):
    model = timm.create_model(name, num_classes=0).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.randn(1, 3, 64, 64)
    features = model(images)
    add_head(model, 7, std=2e-5)
    assert torch.equal(model(images), model.get_classifier()(features))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("name", ["vit", "convnext_atto", "simclr_resnet50x2"])
def test_a_classifier_is_written_with_head_and_class_names(tmp_path, tiny_vit, name):
    sizes = {"layers": (1, 1, 1, 1)} if "resnet" in name else {}
    model = tiny_vit() if name == "vit" else timm.create_model(name, num_classes=0, **sizes)
    add_head(model, 3, std=0.1)
    save_classifier(model, tmp_path / "out", ("cat", "dog", "eel"), {})
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model.eval()(images)) and loaded(images).shape == (2, 3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["label_names"] == ["cat", "dog", "eel"]
