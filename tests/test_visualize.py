import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from running import EXAMPLES, run_script
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from tiny_run import SMALL

from mvmae import MultiViewMAE
from mvmae.visualize import contact_sheet, nearest, overlay, pca_colours, reconstruction_picture, to_unit_range

sys.path.insert(0, str(EXAMPLES))

import visualize

QUICK = ["--preset", "quick", "--encoder-args", SMALL, "--decoder-dim", 16, "--device", "cpu", "--monitor-images", 0]
QUICK += ["--batch-size", 8, "--workers", 0, "--warmup-epochs", 1]


@pytest.mark.parametrize(("channels", "size"), [(3, (32, 32)), (3, (32, 48)), (4, (32, 32)), (1, (16, 32))])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_pasted_picture_equals_the_view_on_visible_patches_exactly(tiny_vit, channels, size, norm_pix):
    vit = tiny_vit(in_chans=channels, img_size=size, class_token=False, global_pool="avg")
    model = MultiViewMAE(vit, decoder_dim=16, decoder_depth=1, decoder_heads=2, norm_pix=norm_pix)
    mean, std = [0.5] * channels, [0.25] * channels
    pixels = torch.randint(0, 256, (2, 2, channels, *size)).float() / 255
    views = (pixels - 0.5) / 0.25
    draw = {"mean": mean, "std": std}
    sheet = reconstruction_picture(model, views, **draw, generator=torch.Generator().manual_seed(0))
    zoom = -(-160 // size[1])
    width, height = size[1] * zoom, size[0] * zoom
    tiles = np.array(sheet)[16 : 16 + 4 * (height + 4)]
    for row in range(4):
        tile = [tiles[row * (height + 4) :][:height, 4 + x * (width + 4) :][:, :width][::zoom, ::zoom] for x in range(4)]
        original, seen, _, pasted = tile
        expected = (pixels.flatten(0, 1)[row, :3] * 255).round().byte()
        expected = (expected if channels >= 3 else expected[:1].expand(3, -1, -1)).permute(1, 2, 0).numpy()
        assert np.abs(original.astype(int) - expected).max() <= 1  # normalised and back, in float32
        visible = ~(seen == 128).all(2).reshape(size[0] // 8, 8, size[1] // 8, 8).all((1, 3))
        patches = visible.repeat(8, 0).repeat(8, 1)
        assert 0 < visible.sum() < visible.size
        assert np.array_equal(pasted[patches], original[patches])
        assert not np.array_equal(pasted[~patches], original[~patches])


def test_normalisation_is_undone():
    images = torch.rand(2, 4, 5, 6)
    mean, std = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.5, 0.6, 0.7, 0.8])
    normal = (images - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(to_unit_range(normal, mean.tolist(), std.tolist()), images)


def test_heat_is_laid_over_from_black_to_white():
    images, heat = torch.rand(2, 3, 8, 8), torch.arange(16.0).reshape(1, 4, 4).repeat(2, 1, 1)
    drawn = overlay(images, heat, opacity=1.0)
    assert torch.equal(drawn[:, :, 0, 0], torch.zeros(2, 3)) and torch.equal(drawn[:, :, -1, -1], torch.ones(2, 3))
    middle = drawn[:, :, 4, 3]
    assert (middle[:, 0] >= middle[:, 1]).all() and (middle[:, 1] >= middle[:, 2]).all()  # red comes first, blue last
    grey = overlay(images, heat, opacity=0.0)
    torch.testing.assert_close(grey, images.mean(1, keepdim=True).expand(-1, 3, -1, -1))
    assert overlay(images, torch.ones(2, 4, 4)).isfinite().all()


def test_colours_are_the_main_directions_of_scikit_learn():
    tokens = torch.randn(3, 20, 12) @ torch.diag(torch.arange(12.0, 0, -1))
    colours = pca_colours(tokens, (4, 5)).permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    values = PCA(3).fit_transform(tokens.reshape(-1, 12).double().numpy())
    low, high = np.quantile(values, [0.01, 0.99], axis=0)
    expected = ((values - low) / (high - low)).clip(0, 1)
    for colour in range(3):
        same, turned = (np.abs(colours[:, colour] - other).max() for other in (expected[:, colour], 1 - expected[:, colour]))
        assert min(same, turned) < 1e-5


def test_neighbours_are_those_of_scikit_learn():
    queries, bank = torch.randn(5, 8), torch.randn(40, 8)
    cosines, rows = nearest(queries, bank, 3)
    found = NearestNeighbors(n_neighbors=3, metric="cosine").fit(bank.numpy())
    distances, expected = found.kneighbors(queries.numpy())
    assert np.array_equal(rows.numpy(), expected)
    np.testing.assert_allclose(1 - cosines.numpy(), distances, atol=1e-6)


def test_a_sheet_holds_tiles_of_any_size_under_their_titles():
    columns = [[torch.rand(3, 20, 100), torch.rand(1, 300, 200)], [torch.ones(3, 10, 400), torch.zeros(4, 30, 30)]]
    sheet = contact_sheet(columns, ["one", "two\nlines"], "note")
    assert sheet.size == (4 + 200 + 4 + 400 + 4, 28 + 40 + 4 + 300 + 4 + 16)
    pixels = np.array(sheet)
    assert (pixels[28:38, 208:608] == 255).all() and (pixels[72 : 72 + 180, 208 : 208 + 180] == 0).all()
    assert (pixels[:28] < 128).any() and (pixels[-16:] < 128).any()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Oblong photographs of four channels, and two runs on them whose decoders differ."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        coarse = rng.integers(0, 255, (4, 6, 4), dtype=np.uint8)
        np.save(folder / "images" / f"{i}.npy", coarse.repeat(12, 0).repeat(12, 1))
    statistics = ["--in-chans", 4, "--mean", *[0.5] * 4, "--std", *[0.25] * 4, "--image-size", 32, 48]
    for depth in (1, 2):
        more = ["--decoder-depth", depth, "--output-dir", f"depth{depth}", "--epochs", 2]
        result = run_script("pretrain.py", "--data", "images", *QUICK, *statistics, *more, folder=folder)
        assert result.code == 0, result.err
    return folder


def test_every_picture_of_oblong_images_with_four_channels(place):
    kinds = ["attention", "pca", "neighbours", "reconstructions", "method"]
    given = ["--data", "images", "--models", "depth1", "random:depth1", "depth2", "--draw", *kinds, "--count", 3]
    result = run_script("visualize.py", *given, "--neighbours", 2, "--device", "cpu", folder=place)
    assert result.code == 0, result.err
    columns = {"attention": 1 + 2 * 3, "pca": 1 + 3, "neighbours": 1 + 2 * 3, "reconstructions": 2 + 2 * 2, "method": 7}
    for kind in kinds:
        with Image.open(place / "runs/pictures" / f"{kind}.png") as sheet:
            assert sheet.width == 4 + columns[kind] * (192 + 4) and sheet.height > 3 * 128
        singles = sorted((place / "runs/pictures" / kind).iterdir())
        assert len(singles) == 3 * columns[kind]
        with Image.open(singles[0]) as single:
            assert single.size == (48, 32)


def test_any_model_of_timm_at_any_size(place, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(6):
        Image.effect_noise((80, 60), 40 + 20 * i).convert("RGB").save(images / f"{i}.png")
    given = ["--data", images, "--models", "random:vit_tiny_patch16_224", "--image-size", 32, 64, "--neighbours", 1]
    result = run_script("visualize.py", *given, "--count", 2, "--output-dir", tmp_path / "out", folder=tmp_path)
    assert result.code == 0 and "no reconstructions: none of the models is a run" in result.out, result.err
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {
        "attention.png",
        "pca.png",
        "neighbours.png",
        "shares.png",
    }


def test_shares_of_the_variance_by_what_can_be_seen_and_by_class(tmp_path):
    rng = np.random.default_rng(0)
    for name, light in (("dark", 60), ("light", 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(15):
            pixels = rng.normal(light, 10, (32, 32, 3)).clip(0, 255)
            pixels[: rng.integers(4, 28)] = 0  # the lit area has nothing to do with the class
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"images/{name}/{i}.png")
    given = ["--data", "images", "--models", "random:vit_tiny_patch16_224", "--image-size", 32, "--draw", "shares"]
    result = run_script("visualize.py", *given, "--output-dir", "out", folder=tmp_path)
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "out/shares.json").read_text())
    shares = found["shares"]["random:vit_tiny_patch16_224"]
    assert found["images"] == 30 and list(shares) == ["brightness", "contrast", "lit area", "class"]
    assert 0.1 < shares["class"] < shares["brightness"] <= 1  # the tenths of brightness tell the classes apart
    with Image.open(tmp_path / "out/shares.png") as picture:
        assert min(picture.size) > 300


def test_images_are_grouped_by_brightness_contrast_and_lit_area():
    areas, lights = torch.randperm(20), torch.randperm(20)
    images = torch.zeros(20, 1, 20, 20)
    for image, area, light in zip(images, areas, lights, strict=True):
        image[0, : area + 1] = 60 + 5 * light
    groups = visualize.properties(images.byte(), torch.full((20,), -1))
    assert torch.equal(groups["lit area"], areas // 2) and torch.equal(groups["brightness"], lights // 2)
    assert groups.keys() == {"brightness", "contrast", "lit area"}
    assert groups["contrast"].bincount().tolist() == [2] * 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--draw", "atention"], "--draw: invalid choice"),
        (["--count", 11], "--neighbours 5 of 1 other images"),
        (["--models", "depth1", "random:vit_tiny_patch16_224"], "images of other sizes or channels"),
        (["--models", "random:resnet18"], "plain ViT"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(place, arguments, words):
    given = ["--data", "images", "--models", "depth1", "--device", "cpu", "--output-dir", "other", *arguments]
    result = run_script("visualize.py", *given, folder=place)
    assert result.code == 2 and words in result.err and "Traceback" not in result.err, result.err
