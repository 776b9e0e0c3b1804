"""Odd pictures train and are measured as the plain 8-bit pictures that they show, in every script, by the run's own record."""

import json

import numpy as np
import pytest
import tifffile
import timm
import torch
from PIL import Image
from running import run_script
from tiny_run import ARGUMENTS, losses

import mvmae
from mvmae import hub
from mvmae.data import EvalTransform
from mvmae.inputs import Inputs, inputs_of, set_inputs

COLOUR = "#c05020"
COMMON = {
    "holes": [],
    "deep": ["--in-chans", 1, "--mean", 0.4, "--std", 0.2, "--image-size", 32, 48],
    "bands": ["--in-chans", 5, "--mean", "auto", "--std", "auto", "--image-size", 24],
}
OPTIONS = {"holes": ["--background", COLOUR], "deep": ["--value-range", 0, 4095], "bands": ["--value-range", 100, 4195]}
"""What the odd pictures of each kind need; the plain ones do without."""


def noise(rng, channels):
    return np.stack(
        [np.array(Image.fromarray(rng.integers(0, 256, (6, 8), dtype=np.uint8)).resize((48, 40))) for _ in channels], 2
    )


def write_pair(kind, odd, plain, rng):
    """Write a picture of a kind, and what it shows in 8 bits, computed by NumPy and Pillow alone."""
    if kind == "holes":
        image, alpha = Image.fromarray(noise(rng, "rgb")), Image.fromarray(noise(rng, "a")[..., 0])
        ground = Image.new("RGB", image.size, COLOUR)
        holes = alpha.point(lambda value: 255 * (value > 100))
        ground.paste(image, mask=holes)
        ground.save(plain.with_suffix(".png"))
        image.putalpha(holes)
        image.save(odd.with_suffix(".png"))
    elif kind == "deep":
        values = noise(rng, "g")[..., 0].astype(np.uint16) * 16 + 7
        Image.fromarray(np.rint(values * (255 / 4095)).astype(np.uint8)).save(plain.with_suffix(".png"))
        Image.fromarray(values).save(odd.with_suffix(".png"))
    else:
        values = noise(rng, "abcde").astype(np.uint16) * 16 + 100
        np.save(plain.with_suffix(".npy"), np.rint((values - 100.0) * (255 / 4095)).astype(np.uint8))
        tifffile.imwrite(odd.with_suffix(".tif"), values, photometric="minisblack", planarconfig="contig")


@pytest.fixture(scope="module", params=COMMON)
def kind(request, tmp_path_factory):
    """A kind's name and folder: odd and plain pictures of two classes, and a run on each."""
    place, rng = tmp_path_factory.mktemp(request.param), np.random.default_rng(0)
    for number in range(24):
        paths = [place / folder / "ab"[number % 2] / str(number) for folder in ("odd", "plain")]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        write_pair(request.param, *paths, rng)
    for folder, options in (("odd", OPTIONS[request.param]), ("plain", [])):
        given = ["--data", folder, "--output-dir", f"run-{folder}/run", *ARGUMENTS, "--epochs", 2, "--workers", 0]
        done = run_script("pretrain.py", *given, *COMMON[request.param], *options, folder=place)
        assert done.code == 0, done.err
    return request.param, place


def test_pretraining_equals_that_on_the_plain_pictures_and_saves_how_they_were_read(kind):
    name, place = kind
    assert losses(place / "run-odd") == losses(place / "run-plain") and len(losses(place / "run-odd")) > 3
    saved = [
        json.loads((place / f"run-odd/run/{file}").read_text())["inputs"] for file in ("config.json", "encoder/config.json")
    ]
    assert saved[0] == saved[1]
    assert saved[0]["value_range"] == {"deep": [0, 4095], "bands": [100, 4195]}.get(name)
    assert saved[0]["background"] == (COLOUR if name == "holes" else "white")
    if name == "deep":
        assert (saved[0]["size"], saved[0]["mean"], saved[0]["std"]) == ([32, 48], [0.4], [0.2])
    if name == "bands":
        pixels = np.concatenate([np.load(path).reshape(-1, 5) for path in (place / "plain").rglob("*.npy")]) / 255
        np.testing.assert_allclose(saved[0]["mean"], pixels.mean(0), atol=0.02)  # of centre crops


def test_embed_equals_the_encoder_by_hand_whoever_loaded_it(kind):
    """By `mvmae.embed` on an encoder of plain timm, on that of `create_model`, and on the run's folder; and by embed.py."""
    _, place = kind
    folder = place / "run-odd/run/encoder"
    by_timm, ours = (create(f"local-dir:{folder}", pretrained=True) for create in (timm.create_model, mvmae.create_model))
    expected = mvmae.embed(by_timm, place / "plain", value_range=(0, 255)).features
    for model in (by_timm, ours, folder):
        found = mvmae.embed(model, place / "odd")
        assert torch.equal(found.features, expected) and not found.bad
    given = ["--data", "odd", "--model", "run-odd/run", "--output-dir", "f", "--workers", 0, "--device", "cpu"]
    done = run_script("embed.py", *given, folder=place)
    assert done.code == 0, done.err
    np.testing.assert_allclose(np.load(place / "f/features.npy"), expected, atol=1e-6)

    path = next((place / "plain").rglob("1.*"))
    inputs = inputs_of(by_timm)
    pixels = np.load(path) if path.suffix == ".npy" else np.array(Image.open(path))
    pixels = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1).float() / 255
    scale = max(round(side / inputs.crop_pct) / have for side, have in zip(inputs.size, (40, 48), strict=True))
    size = [round(side * scale) for side in (40, 48)]
    resized = torch.nn.functional.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)
    top, left = ((have - want) // 2 for have, want in zip(size, inputs.size, strict=True))
    crop = resized[:, top : top + inputs.size[0], left : left + inputs.size[1]]
    mean, std = (torch.tensor(values)[:, None, None] for values in (inputs.mean, inputs.std))
    assert (
        EvalTransform(by_timm, value_range=(0, 255))(path) * std - (crop - mean)
    ).abs().mean() < 0.05  # half a pixel of the crop


@pytest.mark.parametrize(
    ("script", "arguments", "result"),
    [
        ("finetune.py", ["--preset", "quick", "--epochs", 2, "--batch-size", 8, "--workers", 0, "--model"], "results.json"),
        ("linear_probe.py", ["--preset", "quick", "--epochs", 2, "--batch-size", 8, "--models"], "results.json"),
        ("linear_probe.py", ["--epochs", 1, "--batch-size", 8, "--few-shot", 0, "--workers", 0, "--models"], "results.json"),
        ("visualize.py", ["--draw", "attention", "--models"], "attention.png"),
    ],
)
def test_every_script_measures_what_it_would_on_the_plain_pictures(kind, script, arguments, result):
    _, place = kind
    found = []
    for folder, options in (("odd", []), ("plain", ["--value-range", 0, 255])):  # the run on odd pictures, which it knows
        output = f"{script}-{folder}-{len(arguments)}"
        given = ["--data", folder, "--output-dir", output, "--device", "cpu", *options, *arguments, "run-odd/run"]
        done = run_script(script, *given, folder=place)
        assert done.code == 0, done.err
        found.append((place / output / result).read_bytes())
    if result.endswith(".png"):
        assert found[0] == found[1]
        return
    found = [json.loads(content) for content in found]
    assert without_time(found[0]) == without_time(found[1])
    if script == "finetune.py":
        best = mvmae.create_model(f"local-dir:{place / 'finetune.py-odd-9/best'}", pretrained=True)
        assert inputs_of(best) == inputs_of(mvmae.create_model(f"local-dir:{place / 'run-odd/run/encoder'}"))


RGB = noise(np.random.default_rng(1), "rgb")  # 40 x 48
DEEP = RGB[..., 0].astype(np.uint16)
PALETTE = Image.fromarray(RGB).quantize(16)
TURNED = Image.Exif()
TURNED[0x0112] = 6  # shown after a turn by 90 degrees clockwise


def on_colour(image):
    return np.array(Image.alpha_composite(Image.new("RGBA", image.size, COLOUR), image).convert("RGB"))


def see_through(image):
    return Image.fromarray(
        np.dstack([np.array(image.convert("RGB")), np.where(np.array(image) == 0, 128, 255).astype(np.uint8)])
    )


SHOWN = {  # how a picture is written, what is said of it, and the pixels that it shows
    "16 bits": (lambda path: Image.fromarray(DEEP * 257).save(f"{path}.png"), {}, DEEP),
    "16 bits, RGB": (lambda path: tifffile.imwrite(f"{path}.tif", RGB.astype(np.uint16) * 257, photometric="rgb"), {}, RGB),
    "12 bits": (
        lambda path: Image.fromarray(DEEP * 16).save(f"{path}.png"),
        {"value_range": (0, 4095)},
        np.rint(DEEP * (16 * 255 / 4095)),
    ),
    "bands": (
        lambda path: tifffile.imwrite(
            f"{path}.tif", RGB.repeat(2, 2)[..., :5], photometric="minisblack", planarconfig="contig"
        ),
        {},
        None,
    ),
    "grey": (lambda path: Image.fromarray(RGB[..., 0]).save(f"{path}.png"), {}, RGB[..., 0]),
    "floats": (lambda path: np.save(f"{path}.npy", RGB.astype(np.float32) / 127.5 - 1), {"value_range": (-1, 1)}, RGB),
    "palette with alpha": (
        lambda path: PALETTE.save(f"{path}.png", transparency=bytes([128] + [255] * 15)),
        {"background": COLOUR},
        on_colour(see_through(PALETTE)),
    ),
    "EXIF": (
        lambda path: Image.fromarray(RGB).transpose(Image.Transpose.ROTATE_90).save(f"{path}.png", exif=TURNED),
        {},
        RGB,
    ),
    "CMYK": (
        lambda path: Image.fromarray(np.dstack([RGB, RGB[..., 0]]), "CMYK").save(f"{path}.tif"),
        {},
        np.array(Image.fromarray(np.dstack([RGB, RGB[..., 0]]), "CMYK").convert("RGB")),
    ),
}


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("kind", SHOWN)
def test_the_feature_of_an_odd_picture_is_that_of_its_pixels_by_hand(kind, tmp_path, tiny_vit):
    """Of the model's size, 40 x 48, so that nothing is resized; the model is told by its record, or by arguments."""
    write, options, pixels = SHOWN[kind]
    pixels = RGB.repeat(2, 2)[..., :5] if pixels is None else pixels
    pixels = torch.from_numpy(pixels.reshape(40, 48, -1).astype(np.float32)).permute(2, 0, 1)[None] / 255
    (tmp_path / "images").mkdir()
    write(tmp_path / "images" / "0")
    channels = pixels.shape[1]
    vit, size, mean, std = tiny_vit(in_chans=channels, img_size=(40, 48)).eval(), (40, 48), (0.4,) * channels, (0.2,) * channels
    with torch.no_grad():
        expected = vit.forward_head(vit.forward_features((pixels - 0.4) / 0.2), pre_logits=True)
    set_inputs(vit, Inputs(size, mean, std, crop_pct=1.0))
    told = mvmae.embed(vit, tmp_path / "images", **options)
    set_inputs(vit, Inputs(size, mean, std, crop_pct=1.0, **options))
    hub.export(vit, tmp_path / "encoder")
    for found in (told, mvmae.embed(tmp_path / "encoder", tmp_path / "images")):
        torch.testing.assert_close(found.features.cpu(), expected, atol=1e-5, rtol=0)


def without_time(result):
    lines = result if isinstance(result, list) else [result]
    return [{key: value for key, value in line.items() if key not in ("seconds", "data")} for line in lines]


def test_a_record_says_what_it_was_told_and_timm_follows(tiny_vit, tmp_path):
    vit = tiny_vit()
    assert inputs_of(vit).size == (32, 32) and inputs_of(tiny_vit(in_chans=1)).mean == (0.5,)
    with pytest.raises(ValueError, match="4 channels"):
        inputs_of(tiny_vit(in_chans=4))
    record = Inputs((32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.75, "#102030", (0.0, 4095.0), 10**6)
    set_inputs(vit, record)
    assert inputs_of(vit) == record and inputs_of(vit, background="black", mean=None).background == "black"
    cfg = timm.data.resolve_model_data_config(vit)
    assert (cfg["mean"], cfg["crop_pct"], cfg["interpolation"]) == (record.mean, 0.75, "bilinear")
    done = run_script("embed.py", "--data", "sample", "--background", "no", folder=tmp_path)
    assert done.code == 2 and "background must be a colour" in done.err
