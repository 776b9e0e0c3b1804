"""`export.py --onnx`: one file that ONNX Runtime computes with as PyTorch does, and that says how to prepare an image.

Outputs are compared by their distance as a share of PyTorch's norm, which must be at most 1e-4 (about 1e-6 is seen).
"""

import json
import re
import sys
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from running import run_script
from test_export import fine_tuned

from mvmae import MultiViewMAE, WeightsError, embed, hub
from mvmae.data import open_images

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
STATISTICS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
FAMILIES = {
    "vit_small_patch14_reg4_dinov2": {"img_size": 56, "num_heads": 3},
    "vit_small_patch16_dinov3": {"img_size": 64, "num_heads": 3},
    "eva02_tiny_patch14_224": {"img_size": 56, "num_heads": 3},
    "vit_base_patch16_siglip_224": {"img_size": 64, "num_heads": 3},
    "vit_base_patch32_clip_224": {"img_size": (64, 96), "num_heads": 3},
}


def distance(found, expected):
    expected = torch.as_tensor(expected)
    return float(((torch.as_tensor(found) - expected).norm(dim=1) / expected.norm(dim=1)).max())


def session_of(folder):
    return onnxruntime.InferenceSession(folder / "encoder.onnx", providers=["CPUExecutionProvider"])


def assert_computes_as(model, folder, images):
    with torch.inference_mode():
        assert distance(session_of(folder).run(None, {"images": images.numpy()})[0], model(images)) <= 1e-4


def told(session):
    return {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}


def photographs():
    """A tile of each photograph of scikit-image, as Pillow images."""
    source = open_images("sample", split="val")
    return [Image.fromarray(source.image(index)) for index in range(0, len(source), 36)]


def from_card(folder, picture, tmp_path, monkeypatch):
    """What the model card's example computes for a picture, called by a user who has copied it."""
    picture.save(tmp_path / "photograph.jpg", quality=100, subsampling=0)
    (example,) = re.findall(r"ONNX Runtime:\n\n```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert "torch" not in example and "timm" not in example
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(example.replace('"encoder.onnx"', repr(str(folder / "encoder.onnx"))), namespace)
    return namespace


def test_the_features_of_photographs_are_timms_at_any_batch_size(tiny_vit, tmp_path):
    hub.export(MultiViewMAE(tiny_vit(), decoder_dim=16, decoder_heads=2, decoder_depth=1), tmp_path, **STATISTICS)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = torch.stack([transform(image) for image in photographs()])
    assert hub.write_onnx(tmp_path, images) <= 1e-4
    assert str(Path(timm.__file__).parents[1]).encode() not in (tmp_path / "encoder.onnx").read_bytes()  # no local path
    session = session_of(tmp_path)
    assert [(found.name, found.shape[1:]) for found in session.get_inputs()] == [("images", [3, 32, 32])]
    assert [found.name for found in session.get_outputs()] == ["features"]
    with torch.inference_mode():
        expected = model(images)
    for count in (1, 2, 3, len(images)):
        (found,) = session.run(None, {"images": images[:count].numpy()})
        assert found.shape == (count, 48) and distance(found, expected[:count]) <= 1e-4


def test_the_file_says_how_timm_prepares_an_image(tiny_vit, tmp_path):
    vit = tiny_vit(img_size=(32, 48))
    hub.export(vit, tmp_path, **STATISTICS, interpolation="bilinear", crop_pct=0.75, background="black")
    hub.write_onnx(tmp_path, torch.randn(1, 3, 32, 48))
    about = told(session_of(tmp_path))
    assert about == json.loads((tmp_path / "config.json").read_text())["inputs"]
    assert (about["mean"], about["std"], about["size"]) == (*STATISTICS.values(), [32, 48])
    assert (about["interpolation"], about["crop_pct"], about["background"]) == ("bilinear", 0.75, "black")
    own = timm.data.create_transform(**timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}")))
    keys = ("mean", "std", "interpolation", "crop_pct")
    given = {key: about[key] for key in keys} | {"input_size": (3, *about["size"]), "crop_mode": "center"}
    assert str(timm.data.create_transform(**given)) == str(own)


@pytest.mark.parametrize("name", FAMILIES)
def test_encoders_of_other_families_are_written_too(name, tmp_path):
    vit = timm.create_model(name, embed_dim=48, depth=2, num_classes=0, **FAMILIES[name]).eval()
    hub.export(vit, tmp_path)
    images = torch.randn(3, 3, *vit.patch_embed.img_size)
    assert hub.write_onnx(tmp_path, images) <= 1e-4
    assert_computes_as(vit, tmp_path, images)


def test_a_script_writes_it_beside_the_rest_and_the_card_tells_how_to_use_it(tmp_path, monkeypatch):
    vit = fine_tuned(tmp_path / "run")
    done = run_script("export.py", "--run", "run", "--output-dir", "out", "--onnx", folder=tmp_path)
    assert done.code == 0, done.err
    assert "its outputs differ from PyTorch's by" in done.out
    session = session_of(tmp_path / "out")
    assert [found.name for found in session.get_outputs()] == ["logits"]
    assert told(session)["label_names"] == ["cat", "dog", "eel"]
    assert_computes_as(vit, tmp_path / "out", torch.randn(2, 3, 32, 32))
    picture = photographs()[3]
    namespace = from_card(tmp_path / "out", picture, tmp_path, monkeypatch)
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        expected = model(transform(picture)[None])
    assert distance(namespace["logits"], expected) < 0.1  # the sizes are rounded otherwise, and JPEG
    for name in ("encoder.onnx", "model.safetensors"):
        assert f"- {name}: sha256" in (tmp_path / "out" / "README.md").read_text()
    assert tmp_path / "out" / "encoder.onnx" in hub.published(tmp_path / "out")
    assert not list((tmp_path / "out").glob(".onnx*"))


@pytest.mark.parametrize("channels", [1, 13])
def test_the_cards_example_knows_the_number_of_channels_and_goes_with_the_weights(channels, tiny_vit, tmp_path, monkeypatch):
    hub.export(tiny_vit(in_chans=channels), tmp_path, mean=[0.5] * channels, std=[0.25] * channels)
    hub.write_onnx(tmp_path, torch.randn(2, channels, 32, 32))
    hub.write_card(tmp_path, repo="me/encoder")
    assert "encoder.onnx" in (tmp_path / "README.md").read_text()
    namespace = from_card(tmp_path, photographs()[0], tmp_path, monkeypatch)
    assert namespace["features"].shape == (1, 48) and np.isfinite(namespace["features"]).all()
    if channels == 1:  # what the package's own embedding of the photograph is
        (tmp_path / "photos").mkdir()
        (tmp_path / "photograph.jpg").rename(tmp_path / "photos" / "photograph.jpg")
        assert distance(namespace["features"], embed(tmp_path, tmp_path / "photos").features) < 0.1
    hub.export(tiny_vit(in_chans=channels), tmp_path, mean=[0.5] * channels, std=[0.25] * channels)  # other weights
    hub.write_card(tmp_path, repo="me/encoder")
    assert not (tmp_path / "encoder.onnx").exists() and "onnx" not in (tmp_path / "README.md").read_text()


def test_weights_too_large_for_one_file_lie_beside_it(tiny_vit, tmp_path, monkeypatch):
    program = torch.onnx.ONNXProgram
    monkeypatch.setattr(program, "save", partialmethod(program.save, external_data=True))  # as torch does above 2 GB
    vit, images = tiny_vit().eval(), torch.randn(2, 3, 32, 32)
    hub.export(vit, tmp_path, **STATISTICS)
    hub.write_onnx(tmp_path, images)
    assert (tmp_path / "encoder.onnx.data").stat().st_size > (tmp_path / "encoder.onnx").stat().st_size / 10
    assert_computes_as(vit, tmp_path, images)
    hub.write_card(tmp_path, repo="me/encoder")
    assert {path.name for path in hub.published(tmp_path)} >= {"encoder.onnx", "encoder.onnx.data"}
    assert "- encoder.onnx.data: sha256" in (tmp_path / "README.md").read_text()


def test_a_file_that_computes_something_else_is_not_written(tiny_vit, tmp_path, monkeypatch):
    hub.export(tiny_vit(), tmp_path, **STATISTICS)
    export, other = torch.onnx.export, tiny_vit().eval()
    monkeypatch.setattr(torch.onnx, "export", lambda model, *args, **options: export(other, *args, **options))
    with pytest.raises(WeightsError, match=r"differ from PyTorch's by .* more than 0.0001; no encoder.onnx is written"):
        hub.write_onnx(tmp_path, torch.randn(2, 3, 32, 32))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def without_onnxruntime():
    sys.modules["onnxruntime"] = None


def test_a_missing_library_is_one_line_before_anything_is_written(tmp_path):
    fine_tuned(tmp_path / "run")
    done = run_script("export.py", "--run", "run", "--onnx", folder=tmp_path, patch=without_onnxruntime)
    assert (
        done.code == 2
        and done.err.count("\n") == 1
        and done.err.startswith("error: encoder.onnx")
        and "mvmae[onnx]" in done.err
    )
    assert 'pip install "mvmae[onnx]"' in done.err and not (tmp_path / "run" / "encoder").exists()
