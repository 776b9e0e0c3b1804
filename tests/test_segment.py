"""segment.py: label maps, augmentation, the sliding test, the numbers and the recipe; `test_dense_runs` has whole runs."""

import colorsys
import json
import os
import sys
from functools import partial

import numpy as np
import pytest
import torch
from pictures import write_bomb
from PIL import Image
from running import EXAMPLES, run_script
from torch import nn
from torchvision.tv_tensors import Image as Pixels
from torchvision.tv_tensors import Mask

sys.path.insert(0, str(EXAMPLES))

import segment
from engine.options import parse
from tasks.ade20k import IGNORE, LabelMaps, augment, confusion, distort, find_classes, fitting_size, read_split, scores
from tasks.dense import build_trunk, lr_factor, param_groups

TINY = "img_size=32 patch_size=8 embed_dim=32 depth=4 num_heads=2"
SMALL = ["--model-args", TINY, "--image-size", 32, "--channels", 16, "--toy-images", 12, "--workers", 0, "--batch-size", 4]
SMALL += ["--steps", 6, "--log-every", 1, "--device", "cpu", "--pictures", 0]


def config_of(preset, *arguments):
    given = ["--preset", preset, "--data", "x", "--model", "random:mvmae_vit_base_patch16", *map(str, arguments)]
    return parse(segment.Config, segment.PRESETS, None, given)


@pytest.fixture
def folder(tmp_path):
    """Two images of ADE20K's layout with labels 0 (left out) to 3."""
    labels = np.zeros((20, 30), np.uint8)
    labels[5:, :10], labels[5:, 10:20], labels[5:, 20:] = 1, 2, 3
    for place in (f"{split}/part{number}" for split in ("training", "validation") for number in range(2)):
        for kind in ("images", "annotations"):
            (tmp_path / kind / place).mkdir(parents=True)
        image, name = Image.fromarray(np.repeat(labels[:, :, None] * 80, 3, 2)), place[-1]
        image.save(tmp_path / "images" / place / f"{name}.jpg", quality=95)
        Image.fromarray(labels).save(tmp_path / "annotations" / place / f"{name}.png")
    return tmp_path


def open_maps(folder, split="val", left_out=(0, 255), **options):
    """A split of a data set, some of whose labels are left out."""
    splits = {name: read_split(folder, name) for name in ("train", "val")}
    return LabelMaps(splits[split], find_classes(folder, splits, dict.fromkeys(left_out, "--cure")), **options)


def rewrite(folder, labels, split="*"):
    """Give all images of a split the label map ``labels``, an image."""
    for path in (folder / "annotations").glob(f"{split}/*/*"):
        path.unlink()
        labels.save(path.with_suffix(".png"))


def test_label_0_is_left_out_and_the_others_count_from_0(folder):
    image, labels = open_maps(folder)[0, 0]
    assert (image.shape, image.dtype) == ((3, 20, 30), torch.uint8)
    assert labels[[0, 10, 10, 10], [9, 0, 10, 20]].tolist() == [IGNORE, 0, 1, 2]
    assert open_maps(folder, left_out=[])[0, 0][1][[0, 10], [0, 25]].tolist() == [0, 3]


def test_images_are_upright_as_their_label_maps_are(folder):
    """Labelling tools draw on the image as it is seen; orientation 6 is stored turned to the left."""
    seen, path = open_maps(folder)[0, 0], folder / "images/validation/part0/0.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(path, quality=95, exif=exif)
    image, labels = open_maps(folder)[0, 0]
    assert torch.equal(labels, seen[1]) and image.shape == seen[0].shape
    assert (image.int() - seen[0].int()).abs().max() < 25  # JPEG twice


LABELS = np.repeat(np.arange(3, dtype=np.uint8), 200).reshape(20, 30)
RGB, PALETTE = Image.fromarray(LABELS).convert("RGB"), Image.fromarray(LABELS, "P")
PALETTE.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
MAPS = {"grey as RGB": RGB, "palette": PALETTE, "16 bits": Image.fromarray(LABELS.astype(np.uint16))}
MAPS |= {"opaque": Image.fromarray(LABELS).convert("LA"), "1 bit": Image.fromarray(LABELS > 0)}


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIF"])
def test_label_maps_of_any_mode_and_lossless_format_give_their_numbers(folder, kind, suffix):
    for path in (folder / "annotations").rglob("*.png"):
        MAPS[kind].save(path.with_suffix(suffix), "PNG" if suffix == ".png" else "TIFF")
        path.unlink() if suffix != ".png" else None
    labels = open_maps(folder, left_out=[])[0, 0][1]
    np.testing.assert_array_equal(labels, LABELS > 0 if kind == "1 bit" else LABELS)


@pytest.mark.parametrize("suffix", [".tif", ".JPEG", ".webp", ".bmp"])
def test_images_of_any_kind_are_used_and_counted(folder, suffix):
    with Image.open(folder / "images/training/part0/0.jpg") as image:
        image.save(folder / f"images/training/part0/0{suffix}")
    (folder / "images/training/part0/0.jpg").unlink()
    data = open_maps(folder, "train")
    assert len(data) == 2 and f"1 {suffix.lower()}" in data.note
    assert data[0, 0][0].shape == (3, 20, 30)


def fifo(path):
    os.mkfifo(path) if hasattr(os, "mkfifo") else pytest.skip("no FIFO here")


def saved(mode, size=(30, 20), colour=2):
    return lambda path: Image.new(mode, size, colour).save(path)


WRONG = {
    "colours": (
        saved("RGB", colour=(1, 2, 3)),
        r"0\.png must hold one number of 0 to 255 for each pixel, got Pillow's mode RGB",
    ),
    "see-through": (saved("LA", colour=(2, 9)), r"0\.png must hold one number"),
    "beyond 255": (saved("I;16", colour=300), r"0\.png must hold one number .* values up to 300"),
    "other size": (saved("L", (3, 3)), r"0\.jpg must have 3x3 pixels, as .*0\.png says, got 30x20"),
    "turned": (saved("L", (20, 30)), r"0\.jpg must have 20x30 pixels, as .*0\.png says, got 30x20"),
    "cut": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0"), r"0\.png cannot be read as a label map"),
    "empty": (lambda path: path.write_bytes(b""), r"0\.png cannot be read as a label map"),
    "bomb": (write_bomb, r"0\.png cannot be read as a label map \(.*(Bomb|max-pixels)"),
    "missing": (lambda path: None, r"part0/0\.png is missing, or no file"),
    "FIFO": (fifo, r"part0/0\.png is missing, or no file"),
    "a lossy format": (lambda path: saved("L")(path.with_suffix(".jpg")), r"part0/0\.png is missing, or no file"),
    "unknown label": (saved("L", colour=9), "must hold labels that occur in training alone, got 9 too: --ignore-label 9"),
    "one class": (saved("L", colour=2), r"validation.* must hold pixels of 2 classes or more, got 1"),
}


@pytest.mark.parametrize("split", ["training", "validation"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_label_maps_are_refused_by_name(folder, name, split):
    spoil, words = WRONG[name]
    if name in ("unknown label", "one class"):
        rewrite(folder, Image.new("L", (30, 20), 9 if name == "unknown label" else 2), "validation")
    path = folder / f"annotations/{split}/part0/0.png"
    path.unlink()
    spoil(path) if name not in ("unknown label", "one class") else saved("L")(path)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        open_maps(folder)
    assert "\n" not in str(error.value)


def test_the_classes_are_those_that_occur_or_that_classes_txt_names(folder):
    data = open_maps(folder)
    assert (data.names, data.counts) == (["1", "2", "3"], [300, 300, 300]) and "25.0% of their pixels left out" in data.note
    assert open_maps(folder, left_out=[]).counts == [300, 300, 300, 300]
    rewrite(folder, Image.fromarray(np.arange(600, dtype=np.uint32).reshape(20, 30).clip(7, 9).astype(np.uint8)), "validation")
    for split in ("validation", "training"):
        rewrite(folder, Image.fromarray(np.where(np.arange(30) < 9, np.uint8(255), np.uint8(7))[None].repeat(20, 0)), split)
    assert (open_maps(folder, left_out=[0]).names, open_maps(folder, left_out=[0]).counts) == (["7", "255"], [840, 360])
    (folder / "classes.txt").write_text("sky\nroad\nsky\n")
    with pytest.raises(ValueError, match=r"classes\.txt must name each class once"):
        open_maps(folder)
    (folder / "classes.txt").write_text("sky\nroad\n")
    with pytest.raises(ValueError, match=r"must hold labels named in .*classes\.txt alone, got 7, 255 too"):
        open_maps(folder, left_out=[0])


@pytest.mark.parametrize(
    ("values", "left_out"), [((0, 255), (0, 255)), ((0, 255), (255,)), ((0, 1), (0, 255)), ((5, 5), (255,))]
)
def test_labels_that_leave_nothing_to_learn_are_refused_with_the_cure(folder, values, left_out):
    """Whatever is predicted, one class is perfect."""
    rewrite(folder, Image.fromarray(np.where(np.arange(30) < 9, *values)[None].repeat(20, 0).astype(np.uint8)))
    with pytest.raises(ValueError, match="must hold pixels of 2 classes or more, got [01]; left out are labels") as error:
        open_maps(folder, left_out=left_out)
    shares = {value: share for value, share in zip(values, ("30.0%", "70.0%"), strict=True) if value in left_out}
    assert all(f"{value} ({share} of the pixels; --cure)" in str(error.value) for value, share in shares.items())


def test_ignored_labels_are_no_classes_and_the_others_keep_their_order(folder):
    labels = open_maps(folder, left_out=[0, 2, 255])[0, 0][1]
    assert labels[[0, 10, 10, 10], [0, 0, 10, 20]].tolist() == [IGNORE, 0, IGNORE, 1]
    for names in ("sky\nroad\ncar\nvoid\n", "sky\nroad\ncar\n"):  # may name ignored labels, or leave them out at the end
        (folder / "classes.txt").write_text(names)
        assert open_maps(folder, left_out=[3, 255]).names == ["sky", "road", "car"]
    (folder / "classes.txt").write_text("road\nvoid\ncar\n")  # of labels 1 to 3
    assert open_maps(folder, left_out=[0, 2, 255]).names == ["road", "car"]


def test_the_augmentation_of_a_sample_depends_on_seed_epoch_and_index_alone(folder):
    first, second = (open_maps(folder, "train", [], transform=partial(augment, side=32)) for _ in range(2))
    image, labels = first[29, 0]
    assert image.shape[1:] == labels.shape == (32, 32)
    assert (type(image), type(labels), image.dtype, labels.dtype) == (torch.Tensor,) * 2 + (torch.uint8, torch.long)
    state = torch.random.get_rng_state()
    assert torch.equal(second[29, 0][0], image) and not torch.equal(second[28, 0][0], image)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_each_pixel_has_the_label_of_the_place_that_it_comes_from(monkeypatch):
    """The image tells where: its red is the column that a pixel comes from, its green the row."""
    monkeypatch.setattr("tasks.ade20k.distort", lambda image: image)
    rows, columns = torch.meshgrid(torch.arange(90), torch.arange(200), indexing="ij")
    image = Pixels(torch.stack([columns, rows, torch.full_like(rows, 50)]).to(torch.uint8))
    labels = (rows // 15 + columns // 20) % 3
    seen, mirrored, sides = 0, set(), set()
    for seed in range(40):
        torch.manual_seed(seed)
        pixels, found = augment(image, Mask(labels.to(torch.uint8)), side=48, fill=(1, 2, 3))
        assert pixels.shape == (3, 48, 48) and found.shape == (48, 48)
        height, width = int((pixels[2, :, 0] == 50).sum()), int((pixels[2, 0] == 50).sum())
        assert (found[height:] == IGNORE).all() and (found[:, width:] == IGNORE).all()
        assert (pixels[:, height:].permute(1, 2, 0) == torch.tensor([1, 2, 3])).all()
        assert (found[:height, :width] < 3).all()
        for y in range(0, height, 5):
            for x in range(0, width, 5):
                column, row = pixels[:2, y, x].tolist()
                # 3: half a pixel at the smallest size
                near = labels[max(row - 3, 0) : row + 4, max(column - 3, 0) : column + 4]
                if (near == near[0, 0]).all():
                    assert found[y, x] == near[0, 0], (seed, y, x)
                    seen += 1
        mirrored.add(bool(pixels[0, 0, 0] > pixels[0, 0, width - 1]))
        sides.add(height)
    assert seen > 500 and mirrored == {False, True}
    assert min(sides) < 30 and max(sides) == 48


def test_a_crop_full_of_one_class_is_drawn_again():
    labels = np.zeros((64, 256), np.uint8)
    labels[:, 200:] = 1
    image, labels = Pixels(torch.zeros(3, 64, 256, dtype=torch.uint8)), Mask(torch.from_numpy(labels))
    shares = []
    for limit in (0.75, 0.0):  # 0 takes what is drawn last
        torch.manual_seed(0)
        crops = [augment(image, labels, side=32, ratio=(2.0, 2.0), max_share=limit)[1] for _ in range(60)]
        shares.append(np.mean([len(crop.unique()) > 1 for crop in crops]))
    assert shares[0] > 2 * shares[1] > 0


def test_distortion_equals_a_slow_loop_over_pixels_in_hsv():
    torch.manual_seed(0)
    image = torch.randint(256, (3, 4, 5), dtype=torch.uint8)
    image[:, 0, 0], image[:, 0, 1] = torch.tensor([7, 7, 7]), torch.tensor([0, 0, 0])
    changes = set()
    for seed in range(80):
        torch.manual_seed(seed)
        place, coins, order = torch.rand(4), torch.rand(4) < 0.5, torch.rand(()) < 0.5
        ranges = ((-32, 32), (0.5, 1.5), (0.5, 1.5), (-0.1, 0.1))
        drawn = [low + (high - low) * at for at, (low, high) in zip(place.tolist(), ranges, strict=True)]
        neutral = (0, 1, 1, 0)
        shift, contrast, saturation, hue = (a if coin else b for a, coin, b in zip(drawn, coins, neutral, strict=True))
        torch.manual_seed(seed)
        result = distort(image)
        assert result.dtype == torch.uint8 and result.shape == image.shape
        for y in range(4):
            for x in range(5):
                colour = [min(max(value + shift, 0), 255) for value in image[:, y, x].tolist()]
                colour = [min(value * contrast, 255) if order else value for value in colour]
                h, s, v = colorsys.rgb_to_hsv(*(value / 255 for value in colour))
                colour = [255 * value for value in colorsys.hsv_to_rgb((h + hue) % 1, min(s * saturation, 1), v)]
                colour = [value if order else min(value * contrast, 255) for value in colour]
                assert result[:, y, x].tolist() == pytest.approx(colour, abs=1), (seed, y, x)
        changes.add((*coins.tolist(), order.item()))
        if not coins.any():
            assert torch.equal(result, image)
    assert len(changes) > 20 and any(not any(change[:4]) for change in changes)


def test_intersection_over_union_equals_a_slow_loop_over_the_whole_set():
    torch.manual_seed(0)
    pairs = [(torch.randint(4, (9, 11)), torch.randint(4, (9, 11))) for _ in range(3)]
    for pred, labels in pairs:
        labels[labels == 3] = IGNORE  # class 3 never occurs
        pred[0] = 2
    result = scores(sum(confusion(pred, labels, 5) for pred, labels in pairs), "abcde")
    pixels = [pair for pred, labels in pairs for pair in zip(pred.flatten().tolist(), labels.flatten().tolist(), strict=True)]
    pixels = [(p, t) for p, t in pixels if t != IGNORE]
    ious, accs = [], []
    for label, name in enumerate("abcde"):
        both = sum(p == t == label for p, t in pixels)
        either, true = sum(label in pair for pair in pixels), sum(t == label for _, t in pixels)
        ious += [100 * both / either] if either else []
        accs += [100 * both / true] if true else []
        assert result["classes"][name]["IoU"] == (pytest.approx(ious[-1]) if either else None)
    assert (result["mIoU"], result["mAcc"]) == (pytest.approx(np.mean(ious)), pytest.approx(np.mean(accs)))
    assert result["aAcc"] == pytest.approx(100 * sum(p == t for p, t in pixels) / len(pixels))
    assert (len(ious), len(accs), result["classes"]["d"]["Acc"]) == (4, 3, None)


class Reds(nn.Module):
    """Names a pixel by its red value, and notes the windows it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.seen.append(images.shape)
        return (torch.stack([-(images[:, 0] - level).square() for level in range(4)], 1), None)


def test_windows_cover_the_image_and_are_averaged():
    model, image = Reds(), torch.randn(3, 18, 11)
    values = segment.slide(model, image, 8, 5)
    assert model.seen == [(3 * 2, 3, 8, 8)]  # from rows 0, 5, 10 and columns 0, 3
    torch.testing.assert_close(values, model(image[None])[0][0])
    assert segment.slide(model, image[:, :5, :6], 8, 5).shape == (4, 5, 6)


def test_windows_start_where_those_of_mmsegmentation_do():
    starts = []

    class Corner(nn.Module):
        def forward(self, images):
            starts.extend((int(image[0, 0, 0]), int(image[1, 0, 0])) for image in images)
            return torch.zeros(len(images), 1, 512, 512), None

    rows, columns = torch.meshgrid(torch.arange(512.0), torch.arange(1100.0), indexing="ij")
    segment.slide(Corner(), torch.stack([rows, columns, rows]), 512, 341)
    grids = max(1100 - 512 + 341 - 1, 0) // 341 + 1
    assert starts == [(0, min(341 * i + 512, 1100) - 512) for i in range(grids)]


def test_an_image_is_resized_to_fit_the_recipe():
    assert fitting_size((640, 480), 512) == (683, 512)
    assert fitting_size((4000, 500), 512) == (2048, 256)
    assert fitting_size((640, 480), 512, 2.0) == (1365, 1024)


def test_a_prediction_has_the_size_of_the_image():
    image = torch.zeros(3, 32, 48)
    image[0, :, 24:], image[0, 16:, :12] = 3.0, 1.0
    pred = segment.predict(config_of("toy", "--image-size", 32, "--stride", 21), Reds(), image)
    assert (pred == image[0].long()).float().mean() > 0.9


def build(config, classes):
    return segment.UPerNet(build_trunk(config, EXAMPLES / "results", taps=segment.taps)[0], classes, config)


def lost_by_decay(model, trunk, config):
    """What a step without gradients takes of each parameter, from 1."""
    optimizer = torch.optim.AdamW(param_groups(model, trunk, config), lr=config.lr)
    for group in optimizer.param_groups:
        group["lr"] *= group["lr_scale"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {name: 1 - p.detach().flatten()[0].item() for name, p in model.named_parameters()}


def test_the_recipe_of_beit_reaches_optimizer_schedule_and_model():
    config = config_of("beit", "--model-args", "depth=12 embed_dim=48 num_heads=3")
    model = build(config, 150)
    trunk = model.backbone.trunk
    lost = lost_by_decay(model, trunk, config)
    assert lost["head.classifier.weight"] == pytest.approx(1e-4 * 0.05, rel=2e-2)
    assert lost["backbone.trunk.blocks.11.mlp.fc1.weight"] == pytest.approx(1e-4 * 0.05 * 0.65, rel=3e-2)
    assert lost["backbone.trunk.blocks.8.mlp.fc1.weight"] == pytest.approx(1e-4 * 0.05 * 0.65**4, rel=0.1)
    for name in ("head.classifier.bias", "backbone.trunk.pos_embed", "backbone.trunk.blocks.11.norm1.weight"):
        assert lost[name] == 0
    steps = (0, 750, 1500, 80_000, 160_000)
    assert [lr_factor(step, config) for step in steps] == pytest.approx([1e-6, 0.4977, 0.9906, 0.5, 0], abs=1e-4)
    assert trunk.taps == (3, 5, 7, 11)
    assert {block.attn.window for block in trunk.blocks} == {None}
    assert trunk.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert trunk.grid_size == (32, 32)
    assert model.head.classifier.weight.shape == (150, 768, 1, 1)
    assert model.auxiliary.layers[-1].weight.shape == (150, 256, 1, 1)
    shorter = config_of("beit", "--steps", 1600)
    assert [lr_factor(step, shorter) for step in (0, 15, 800)] == pytest.approx([1e-6, 0.9906, 0.5], abs=1e-4)  # the same share
    longer = config_of("beit", "--steps", 1600, "--warmup-steps", 100)
    assert lr_factor(50, longer) == pytest.approx(0.5 * (1 - 50 / 1600), abs=1e-4)
    assert (config.batch_size, config.image_size, config.stride, config.ratio) == (16, 512, 341, (0.5, 2.0))


def test_the_loss_is_finite_where_all_pixels_are_left_out_and_the_auxiliary_weight_counts():
    model = build(config_of("toy", *SMALL), 4).eval()
    images, labels = torch.randint(255, (2, 3, 32, 32)), torch.full((2, 32, 32), IGNORE)
    prepare = {"prepare": lambda x: x.float() / 255}
    assert segment.losses(model, (images, labels), aux_weight=0.4, **prepare)["loss_main"] == 0
    labels[0] = 2
    one, two = (segment.losses(model, (images, labels), aux_weight=weight, **prepare) for weight in (0.4, 0.8))
    torch.testing.assert_close(2 * one["loss_aux"], two["loss_aux"])
    main = model(images.float() / 255)[0]
    expected = nn.functional.cross_entropy(main[:1], labels[:1]) / 2  # a mean over all pixels
    torch.testing.assert_close(one["loss_main"], expected)


def test_segmentation_learns_drawn_shapes(tmp_path):
    arguments = ["--preset", "toy", *SMALL, "--steps", 60, "--batch-size", 8, "--toy-images", 60, "--lr", 3e-3]
    result = run_script("segment.py", *arguments, "--warmup-steps", 20, "--output-dir", "run", folder=tmp_path)
    assert result.code == 0, result.err
    classes = json.loads((tmp_path / "run/results.json").read_text())["classes"]
    assert classes["background"]["IoU"] > 75  # about 70 where all is called background


def test_masks_of_0_and_255_end_in_one_line_and_are_learnt_with_the_options_that_it_names(folder):
    rewrite(folder, Image.fromarray(np.where(np.arange(30) < 9, np.uint8(255), np.uint8(0))[None].repeat(20, 0)))
    arguments = ["--preset", "toy", *SMALL, "--steps", 1, "--batch-size", 2, "--data", folder, "--output-dir", "run"]
    result = run_script("segment.py", *arguments, folder=folder)
    assert result.code == 2 and result.err.count("\n") == 1
    assert "--no-reduce-zero-label" in result.err and "--no-ignore-255" in result.err
    result = run_script("segment.py", *arguments, "--no-reduce-zero-label", "--no-ignore-255", folder=folder)
    assert result.code == 0, result.err
    assert list(json.loads((folder / "run/results.json").read_text())["classes"]) == ["0", "255"]
    assert "2 classes, pixels in training and validation: 0 840 and 840, 255 360 and 360" in result.out
