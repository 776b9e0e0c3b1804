import sys

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from running import EXAMPLES, run_script
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from mvmae import MultiViewMAE, hub
from mvmae.visualize import (
    attention_maps,
    contact_sheet,
    nearest,
    overlay,
    pca_colours,
    pictures,
    reconstruction_picture,
    rollout,
    to_unit_range,
)

sys.path.insert(0, str(EXAMPLES))

import visualize
from mvmae.data import DatasetSource, EvalTransform
from tasks import drawn_images, plots


@pytest.mark.parametrize(("channels", "size"), [(3, (32, 32)), (3, (32, 48)), (4, (32, 32)), (1, (16, 32))])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstructions_show_predictions_of_masked_patches_only(tiny_vit, monkeypatch, channels, size, norm_pix):
    vit = tiny_vit(in_chans=channels, img_size=size, class_token=False, global_pool="avg")
    model = MultiViewMAE(vit, decoder_dim=16, decoder_depth=1, decoder_heads=2, norm_pix=norm_pix)
    pixels = torch.randint(0, 256, (2, 2, channels, *size)).float() / 255
    drawn = []
    monkeypatch.setattr(pictures, "contact_sheet", lambda *given, **more: drawn.append(given))
    draw = {"mean": [0.5] * channels, "std": [0.25] * channels, "generator": torch.Generator().manual_seed(0)}
    reconstruction_picture(model, (pixels - 0.5) / 0.25, **draw)
    (columns, titles, note) = drawn[0]  # four views: two columns of two
    masked = titles[1]
    assert titles == ["image", masked, "reconstruction"] * 2 and 75 <= float(masked.removesuffix(" % masked")) <= 88
    assert ("the model predicts the pattern" in note) == norm_pix
    original, seen, rebuilt = (torch.cat([columns[part], columns[part + 3]]) for part in range(3))
    torch.testing.assert_close(original, pixels.flatten(0, 1))
    visible = ~(seen == 0.5).all(1).reshape(4, size[0] // 8, 8, size[1] // 8, 8).all(4).all(2)
    assert ((visible.sum((1, 2)) > 0) & (visible.sum((1, 2)) < visible[0].numel())).all()
    patches = visible.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(original)
    assert torch.equal(rebuilt[patches], original[patches]) and torch.equal(seen[patches], original[patches])
    assert not torch.equal(rebuilt[~patches], original[~patches])


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_prediction_of_zero_is_the_mean_of_the_true_patch_where_each_is_normalised_else_the_mean_of_all(tiny_vit, norm_pix):
    model = MultiViewMAE(tiny_vit(), decoder_dim=16, decoder_depth=1, decoder_heads=2, norm_pix=norm_pix)
    for parameter in model.decoder.head.parameters():
        torch.nn.init.zeros_(parameter)
    views = torch.randn(2, 1, 3, 32, 32)
    rebuilt, _ = pictures.reconstruct(model, views)
    for row in range(0, 32, 8):
        for column in range(0, 32, 8):
            patch = views[:, 0, :, row : row + 8, column : column + 8]
            expected = patch.mean((1, 2, 3), keepdim=True).expand_as(patch) if norm_pix else torch.zeros_like(patch)
            torch.testing.assert_close(rebuilt[:, :, row : row + 8, column : column + 8], expected)


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
    drawn = overlay(images, torch.tensor([[[1.0]], [[2.0]]]), opacity=1.0, limits=(1.0, 2.0))
    assert torch.equal(drawn[0], torch.zeros(3, 8, 8)) and torch.equal(drawn[1], torch.ones(3, 8, 8))


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


TILE = torch.ones(1, 3, 160, 160)


def drawn(columns, titles=None, *note, **more):
    """The pixels of a sheet."""
    return np.array(contact_sheet(columns, titles or [""] * len(columns), *note, **more)).astype(int)


def dark_rows(pixels):
    """The rows in which something black is written."""
    return np.flatnonzero((pixels < 100).any((1, 2)))


def test_a_sheet_holds_tiles_of_any_size_under_their_titles():
    columns = [[torch.rand(3, 20, 100), torch.rand(1, 300, 200)], [torch.ones(3, 10, 400), torch.zeros(4, 30, 30)]]
    bare = contact_sheet(columns, ["a", "b"])
    picture = contact_sheet(
        [*columns, [torch.zeros(3, 40, 200)]], ["a", "two\nlines", "c"], "note", captions=[["x", ""], [], []]
    )
    assert bare.width == 4 + 200 + 4 + 400 + 4 and picture.width == bare.width + 204
    line = bare.height - (4 + 40 + 4 + 300 + 4)
    top = 4 + 2 * line
    assert picture.height == top + 40 + line + 4 + 300 + line + 4 + line + 4
    pixels = np.array(picture)
    assert (pixels[top : top + 10, 208:608] == 255).all()
    below = top + 40 + line + 4  # the second row, in which one column has no image
    assert (pixels[below : below + 180, 208 : 208 + 180] == 0).all() and (pixels[below : below + 300, 612:] == 255).all()
    assert (pixels[top + 40 : below - 4, :204] < 100).any() and (pixels[top + 40 : below - 4, 204:] == 255).all()
    assert len(dark_rows(pixels[-line:]))


def test_captions_can_be_read_on_a_sheet_that_a_browser_shrinks_to_800_pixels():
    for count in (1, 4, 12):
        picture = drawn([TILE] * count, ["I"] * count)
        assert np.ptp(dark_rows(picture[:-170])) + 1 >= max(10, 8 * picture.shape[1] / 800)  # height of a capital letter


def test_long_titles_and_notes_stay_within_their_column_and_the_sheet():
    plain = drawn([TILE] * 2, ["title", "b"])
    for title in ("a title of many words, far wider than 160 pixels", "a-name-without-any-space-wider-than-160-pixels"):
        picture = drawn([TILE] * 2, [title, "b"])
        assert (picture[30:, 166:] == 255).all() and len(dark_rows(picture)) > 1.5 * len(dark_rows(plain))
        assert len(drawn([TILE] * 4, [title, "", "", ""])) < len(picture)  # a title reaches over those without one
    noted = drawn([TILE] * 2, ["title", "b"], "a note of so many words that it takes two lines or more below the tiles")
    assert len(noted) - len(plain) > 36 and (noted[:, -2:] == 255).all()


def test_right_and_wrong_tiles_differ_in_colour_and_without_it():
    picture = drawn([torch.zeros(3, 3, 160, 160)] * 2, marks=[None, [True, False, True]])
    top = len(picture) - 3 * 164
    tiles = [[picture[top + 164 * row :, 4 + 164 * column :][:160, :160] for row in range(3)] for column in range(2)]
    assert all((tile == 0).all() for tile in tiles[0])
    right, wrong, again = tiles[1]
    assert np.array_equal(right, again)
    for tile, channel in ((right, 1), (wrong, 0)):
        for edge in (tile[1], tile[-2], tile[:, 1], tile[:, -2]):
            assert (edge.argmax(1) == channel).all()
        assert (tile[30:-5, 30:-5] == 0).all()
    ticks, crosses = ((tile[:24, :24] > 200).all(2) for tile in (right, wrong))
    assert ticks.any() and crosses.any() and not np.array_equal(ticks, crosses)


def test_a_colour_bar_goes_from_black_to_white_between_two_words():
    below = drawn([TILE] * 2, bar=("0.50", "1.50"))[len(drawn([TILE] * 2)) :]
    middle = below[8, 60:270] / 255
    assert (np.diff(middle.sum(1)) >= 0).all() and middle[0].sum() < 0.9 and middle[-1].sum() > 2.1
    assert (below[:, 4:40] < 100).any() and (below[:, -40:-4] < 100).any()


def test_a_legend_names_its_colours_in_as_many_lines_as_it_takes():
    names = [(f"class {i}", (10 * i, 255 - 10 * i, 50)) for i in range(20)]
    below = drawn([TILE], legend=names)[len(drawn([TILE])) :]
    found = {tuple(pixel) for pixel in below.reshape(-1, 3).tolist()}
    assert all(colour in found for _, colour in names) and len(below) > 10 * 16


def test_neighbours_of_the_right_class_are_marked_and_counted():
    colours = torch.tensor([[200, 20, 20], [20, 200, 20], [190, 20, 20], [180, 20, 30], [20, 190, 20], [30, 180, 20]])
    bank, features = colours.byte()[:, :, None, None].expand(-1, -1, 8, 8), {"runs/mean": colours.float()}
    picture = visualize.draw_neighbours(features, bank, torch.tensor([0, 1, 0, 1, 1, 1]), 2)
    assert picture["titles"] == ["image", "mean", "", "", ""]
    cosine = torch.nn.functional.cosine_similarity(colours[[0, 1]].float(), colours[[2, 4]].float())
    assert picture["captions"][1] == [f"{value:.2f}" for value in cosine]
    right = [[True, True], [False, True], [False, True], [False, False]]  # of both images, from the nearest on
    assert picture["marks"] == [None, *right] and "mean 4 of 8" in picture["note"]
    assert torch.equal(picture["columns"][1], bank[[2, 4]] / 255)
    without = visualize.draw_neighbours(features, bank, torch.tensor([0, 1, 0, 1, 1, -1]), 2)
    assert "marks" not in without and "note" not in without and "captions" in without


def test_attention_of_all_models_is_drawn_on_one_scale(tiny_vit):
    vits = [tiny_vit(class_token=False, global_pool="avg").eval(), tiny_vit(depth=1).eval()]
    noise = DatasetSource([Image.effect_noise((40, 36), 30 + 20 * i).convert("RGB") for i in range(3)])
    models = [visualize.Model(name, vit, EvalTransform(vit)) for name, vit in zip("ab", vits, strict=True)]
    picture, received = visualize.draw_attention(models, noise), []
    for model, rows in zip(models, (slice(None), slice(1)), strict=True):  # of the mean patch, of the class token
        weights = rollout(attention_maps(model.vit, model.read(noise)))[:, rows, -16:].mean(1)
        received.append(weights / weights.mean(1, keepdim=True))
    low, high = torch.cat(received).min(), np.quantile(torch.cat(received).numpy(), 0.98)
    assert picture["bar"] == (f"{low:.2f}", f"{high:.2f} or more") and "average patch" in picture["note"]
    assert ["mean patch" in picture["titles"][1], "class token" in picture["titles"][2]] == [True, True]


def test_drawn_images_are_of_all_classes_in_turn_and_no_grey_texture_comes_first():
    grey, flat, coloured = torch.randint(0, 256, (1, 8, 8)).expand(3, -1, -1), torch.full((3, 8, 8), 90), torch.zeros(3, 8, 8)
    flat[0], coloured[0, :4] = 200, 200
    images = [grey, grey, flat, coloured, coloured, grey]
    source = [(image.byte(), label) for image, label in zip(images, [0, 0, 1, 2, 2, 2], strict=True)]
    chosen, labels, places = drawn_images.take(source, 6, lambda image: image, seed=0)
    assert labels.tolist()[:3] == [2, 0, 1] and sorted(places.tolist()) == list(range(6))
    assert all(torch.equal(image, images[place]) for image, place in zip(chosen, places.tolist(), strict=True))
    assert torch.equal(drawn_images.varied(source, lambda image: image, count=2), chosen[:2])


def drawn_axes(monkeypatch, tmp_path, records, names):
    """The axes of curves, by title."""
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *given, **more: (figures.append(figure), savefig(figure, *given, **more))
    )
    plots.draw_curves(tmp_path / "curves.png", records, names, contrast_from=3)
    return {axis.get_title(): axis for figure in figures for axis in figure.axes}


def test_curves_have_units_and_no_axis_is_zoomed_into_noise(monkeypatch, tmp_path):
    rising = {"loss": (2, 1e-6), "knn": (99, 0.1), "top1": (2, 0), "uniformity": (-0.4, -0.2)}
    records = [{"step": i, **{name: start + i * slope for name, (start, slope) in rising.items()}} for i in range(4)]
    records += [{"step": 5, "odd": float("nan")}, {"step": 6, "lr": 0.0, "loss_main": 203.0}, {"step": 7, "loss_main": 0.5}]
    names = ["loss", "knn", "top1", "uniformity", "odd", "lr", "loss_main", "absent"]
    axes = drawn_axes(monkeypatch, tmp_path, records, names)
    units = {"loss": "loss (↓ better)", "knn": "k-NN accuracy, % (↑ better)", "top1": "top-1 accuracy, % (↑ better)"}
    units |= {"uniformity": "uniformity, nats", "odd": "odd", "lr": "learning rate", "loss_main": "loss_main"}
    assert set(axes) == set(units.values()) and all(axis.get_xlabel() == "optimizer steps" for axis in axes.values())
    axes = {name: axes[title] for name, title in units.items()}
    marks = {name: [list(line.get_xdata()) for line in axis.lines[1:]] for name, axis in axes.items()}
    assert marks == {name: [[3, 3]] for name in units}  # where contrast begins
    assert [name for name, axis in axes.items() if axis.get_yscale() == "log"] == ["loss_main"]
    ends = {name: axis.get_ylim() for name, axis in axes.items()}
    assert ends["loss"][1] - ends["loss"][0] >= 0.2 and ends["knn"][0] <= 90 and ends["knn"][1] == 100
    assert ends["top1"][0] == 0 and ends["top1"][1] >= 10 and ends["uniformity"][0] < -1 and ends["uniformity"][1] > -0.4
    assert not axes["loss"].yaxis.get_major_formatter().get_useOffset()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Oblong photographs of four channels, and two encoders of them as runs leave them, with other decoders."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        coarse = rng.integers(0, 255, (4, 6, 4), dtype=np.uint8)
        np.save(folder / "images" / f"{i}.npy", coarse.repeat(12, 0).repeat(12, 1))
    sizes = {"img_size": (32, 48), "in_chans": 4, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    for depth in (1, 2):
        vit = timm.create_model("mvmae_vit_tiny_patch16", **sizes)
        model = MultiViewMAE(vit, decoder_dim=16, decoder_depth=depth, decoder_heads=2)
        hub.export(model, folder / f"depth{depth}" / "encoder", mean=[0.5] * 4, std=[0.25] * 4)
    return folder


def test_every_picture_of_oblong_images_with_four_channels(place):
    given = ["--data", "images", "--models", "depth1", "random:depth1", "depth2", "--count", 3, "--device", "cpu"]
    result = run_script("visualize.py", *given, folder=place)
    assert result.code == 0, result.err
    columns = {"attention": 1 + 3, "pca": 1 + 3, "neighbours": 1 + 4 * 3, "reconstructions": 2 + 2}
    for kind, number in columns.items():
        with Image.open(place / "runs/pictures" / f"{kind}.png") as picture:
            assert picture.width == 4 + number * (192 + 4) and picture.height > 3 * 128


def test_any_model_of_timm_at_any_size(place, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(6):
        Image.effect_noise((80, 60), 40 + 20 * i).convert("RGB").save(images / f"{i}.png")
    given = ["--data", images, "--models", "mvmae_vit_micro_patch8_64", "--image-size", 32, 64, "--device", "cpu"]
    result = run_script("visualize.py", *given, "--count", 2, "--output-dir", tmp_path / "out", folder=tmp_path)
    assert result.code == 0 and "no reconstructions: none of the models is a run" in result.out, result.err
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"attention.png", "pca.png", "neighbours.png"}
    result = run_script("visualize.py", *given, "--draw", "neighbours", folder=tmp_path)
    assert result.code == 0 and "no neighbours: all 6 images are drawn" in result.out, result.err


def test_a_model_that_is_no_plain_vit_is_refused_in_one_line(place):
    given = ["--data", "images", "--models", "random:resnet18", "--device", "cpu", "--output-dir", "other"]
    result = run_script("visualize.py", *given, folder=place)
    assert result.code == 2 and "plain ViT" in result.err and "Traceback" not in result.err, result.err
