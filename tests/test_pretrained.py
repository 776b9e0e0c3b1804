"""The encoder whose weights come with the package: what timm does with a name works, and its features are worth something."""

import socket

import pytest
import safetensors.torch
import timm
import torch
from running import EXAMPLES

import mvmae
from mvmae import encoders, hub
from mvmae.data import open_images
from mvmae.metrics import knn_accuracy

NAME = "mvmae_vit_micro_patch8_64"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_its_weights_are_those_of_the_file_in_float32_and_timm_lists_it():
    (tagged,) = timm.list_pretrained("mvmae_*")
    assert tagged == f"{NAME}.cifar10" and {tagged} == set(encoders.SHIPPED)
    encoder = timm.create_model(NAME, pretrained=True)
    saved = safetensors.torch.load_file(encoders.PRETRAINED / f"{tagged}.safetensors")
    assert saved.keys() == encoder.state_dict().keys()
    for name, value in encoder.state_dict().items():
        assert saved[name].dtype == torch.float16 and value.dtype == torch.float32 and torch.equal(value, saved[name].float())


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"num_classes": 10}, (2, 10)),
        ({"img_size": 96}, (2, 192)),
        ({"in_chans": 1}, (2, 192)),
        ({"patch_size": 16, "img_size": (64, 128)}, (2, 192)),
        ({"features_only": True}, (2, 192, 8, 8)),
    ],
)
def test_all_that_timm_does_with_a_name_works(options, shape):
    model = timm.create_model(NAME, pretrained=True, **options)
    size = options.get("img_size", 64)
    images = torch.randn(2, options.get("in_chans", 3), *(size if isinstance(size, tuple) else (size, size)))
    result = model(images)
    assert (result[-1] if options.get("features_only") else result).shape == shape


def test_it_goes_through_exports_and_timms_own_saver(tmp_path):
    encoder, images = timm.create_model(NAME, pretrained=True).eval(), torch.randn(2, 3, 64, 64)
    hub.export(encoder, tmp_path / "ours")
    timm.models.save_for_hf(encoder, str(tmp_path / "timms"), safe_serialization=True)
    for folder in ("ours", "timms"):
        again = timm.create_model(f"local-dir:{tmp_path / folder}", pretrained=True).eval()
        assert torch.equal(again(images), encoder(images))
    transformers = pytest.importorskip("transformers")
    again = transformers.AutoModel.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(pixel_values=images).pooler_output, encoder(images))


def test_a_folder_of_a_run_stands_for_its_encoder(tmp_path):
    encoder, images = timm.create_model(NAME, pretrained=True).eval(), torch.randn(2, 3, 64, 64)
    hub.export(encoder, tmp_path / "run/encoder")
    (tmp_path / "run/config.json").write_text("{}")
    for name in (f"{tmp_path}/run", f"local-dir:{tmp_path}/run", f"{tmp_path}/run/encoder"):
        assert torch.equal(mvmae.create_model(name, pretrained=True).eval()(images), encoder(images))


def test_a_file_of_another_version_is_refused(monkeypatch):
    monkeypatch.setitem(encoders.SHIPPED, f"{NAME}.cifar10", "0" * 64)
    with pytest.raises(mvmae.WeightsError, match="sha256 differs"):
        timm.create_model(NAME, pretrained=True)


def test_its_features_tell_photographs_apart_better_than_random_ones():
    """On tiles of photographs that it has not seen."""
    found = {}
    for pretrained in (True, False):
        torch.manual_seed(0)
        encoder = timm.create_model(NAME, pretrained=pretrained)
        parts = []
        for split in ("train", "val"):
            source = open_images("sample", split=split)
            parts += [mvmae.embed(encoder, source).features, torch.as_tensor(source.labels)]
        found[pretrained] = 100 * knn_accuracy(*parts, k=20)
    assert found[True] > found[False] + 5


def test_the_pretraining_model_that_goes_on_from_it_lies_beside_its_results():
    (folder,) = [file.parent for file in (EXAMPLES / "results").glob("*/pretraining.json")]
    model, encoder = mvmae.MultiViewMAE.from_pretrained(folder), timm.create_model(NAME, pretrained=True)
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, encoder.state_dict()[name]), name
