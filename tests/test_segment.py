"""segment.py: label maps, augmentation, the sliding test, the numbers and the recipe; `test_dense_runs` has whole runs."""

import colorsys
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from running import EXAMPLES, run_script
from torch import nn
from torchvision.tv_tensors import Image as Pixels
from torchvision.tv_tensors import Mask

sys.path.insert(0, str(EXAMPLES))

import segment
from engine.options import parse
from tasks.ade20k import IGNORE, Augment, LabelMaps, confusion, distort, fitting_size, scores
from tasks.dense import lr_factor, param_groups
from tasks.shapes import write_toy

TINY = "img_size=32 patch_size=8 embed_dim=32 depth=4 num_heads=2"
SMALL = ["--model-args", TINY, "--image-size", 32, "--channels", 16, "--toy-images", 12, "--workers", 0, "--batch-size", 4]
SMALL += ["--steps", 6, "--log-every", 1, "--device", "cpu", "--pictures", 0]
PLAIN = {"reduce_zero_label": False}


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


def count(folder, **options):
    return len(LabelMaps(folder, "val", **options).names)


def test_label_0_is_left_out_and_the_others_count_from_0(folder):
    image, labels = LabelMaps(folder, "val")[0, 0]
    assert (image.shape, image.dtype) == ((3, 20, 30), torch.uint8)
    assert labels[[0, 10, 10, 10], [9, 0, 10, 20]].tolist() == [IGNORE, 0, 1, 2]
    assert LabelMaps(folder, "val", **PLAIN)[0, 0][1][[0, 10], [0, 25]].tolist() == [0, 3]


def test_images_are_upright_as_their_label_maps_are(folder):
    """Labelling tools draw on the image as it is seen; orientation 6 is stored turned to the left."""
    seen, path = LabelMaps(folder, "val")[0, 0], folder / "images/validation/part0/0.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(path, quality=95, exif=exif)
    image, labels = LabelMaps(folder, "val")[0, 0]
    assert torch.equal(labels, seen[1]) and image.shape == seen[0].shape
    assert (image.int() - seen[0].int()).abs().max() < 25  # JPEG twice


def test_wrong_label_maps_are_refused_by_name(folder):
    with pytest.raises(ValueError, match=r"0\.png must hold labels below 3 for 2 classes, got 3"):
        LabelMaps(folder, "val", num_classes=2)[0, 0]
    place = folder / "annotations/validation/part0/0.png"
    for picture in (Image.new("RGB", (30, 20)), Image.new("I;16", (30, 20), 2)):
        picture.save(place)
        for function in (lambda: LabelMaps(folder, "val", num_classes=4)[0, 0], lambda: count(folder)):
            with pytest.raises(ValueError, match=r"0\.png must be an image of one 8-bit channel, got Pillow's mode (RGB|I;16)"):
                function()
    Image.new("L", (3, 3)).save(place)
    with pytest.raises(ValueError, match=r"0\.png must have 30x20 pixels, as its image has, got 3x3"):
        LabelMaps(folder, "val", num_classes=4)[0, 0]
    place.write_bytes(place.read_bytes()[:45])
    with pytest.raises(ValueError, match=r"0\.png cannot be read as a label map"):
        count(folder)
    (folder / "annotations/training/part1/1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"part1/1\.png is missing"):
        LabelMaps(folder, "train", num_classes=4)
    with pytest.raises(FileNotFoundError, match="as ADE20K's layout does"):
        LabelMaps(folder / "images", "train", num_classes=4)


def test_label_maps_tell_the_number_of_classes_and_classes_txt_before_them(folder):
    assert count(folder) == 3
    assert count(folder, **PLAIN) == 4
    rare = np.full((20, 30), 255, np.uint8)
    Image.fromarray(rare).save(folder / "annotations/training/part1/1.png")
    assert count(folder, **PLAIN) == 4  # 255 is no class
    rare[7, 7] = 9
    Image.fromarray(rare).save(folder / "annotations/training/part1/1.png")
    assert count(folder) == 9  # one pixel of the other split
    (folder / "classes.txt").write_text("sky\nroad\n")
    assert LabelMaps(folder, "val", **PLAIN).names == LabelMaps(folder, "val", num_classes=2).names == ["sky", "road"]
    with pytest.raises(ValueError, match=r"must be 2, as .*classes\.txt names them, got 3: leave --num-classes out"):
        LabelMaps(folder, "val", num_classes=3)


def test_masks_of_0_and_255_or_of_one_class_are_refused(folder):
    """Whatever is predicted, one class is perfect."""
    for path in (folder / "annotations").rglob("*.png"):
        Image.fromarray(np.where(np.arange(30) < 9, np.uint8(255), np.uint8(0))[None].repeat(20, 0)).save(path)
    for options, found in (({}, 0), (PLAIN, 1)):
        with pytest.raises(ValueError, match=f"must hold two labels other than (0, )?255, got {found}: number the classes"):
            LabelMaps(folder, "val", **options)


def test_ignored_labels_are_no_classes_and_the_others_keep_their_order(folder):
    labels = LabelMaps(folder, "val", num_classes=2, ignore=[2])[0, 0][1]  # 0 is left out too
    assert labels[[0, 10, 10, 10], [0, 0, 10, 20]].tolist() == [IGNORE, 0, IGNORE, 1]
    data = LabelMaps(folder, "val", ignore=[0, 2], **PLAIN)
    assert torch.equal(data[0, 0][1], labels) and data.names == ["1", "3"]
    plain = LabelMaps(folder, "val", ignore=[3], **PLAIN)
    assert plain[0, 0][1][10, ::10].tolist() == [1, 2, IGNORE] and plain.names == ["0", "1", "2"]
    assert [count(folder, **PLAIN, ignore=ignore) for ignore in ([], [3], [1], [3, 0], [200])] == [4, 3, 3, 2, 4]
    assert count(folder, ignore=[3]) == 2
    with pytest.raises(ValueError, match=r"0\.png must hold labels below 3 for 1 classes, got 3"):
        LabelMaps(folder, "val", num_classes=1, ignore=[2])[0, 0]  # label 1 is the one class
    with pytest.raises(ValueError, match="must hold two labels other than 0, 1, 2, 3, 255, got 0"):
        count(folder, ignore=[1, 2, 3])


def test_classes_txt_may_name_ignored_labels_or_leave_them_out_at_the_end(folder):
    for names in ("sky\nroad\ncar\nvoid\n", "sky\nroad\ncar\n"):
        (folder / "classes.txt").write_text(names)
        assert LabelMaps(folder, "val", ignore=[3], **PLAIN).names == ["sky", "road", "car"]
    (folder / "classes.txt").write_text("road\nvoid\ncar\n")  # of labels 1 to 3
    assert LabelMaps(folder, "val", ignore=[2]).names == ["road", "car"]


def test_the_augmentation_of_a_sample_depends_on_seed_epoch_and_index_alone(folder):
    first, second = (LabelMaps(folder, "train", augment=Augment(32), **PLAIN) for _ in range(2))
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
        pixels, found = Augment(48, fill=(1, 2, 3))(image, Mask(labels.to(torch.uint8)))
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
        augment = Augment(32, ratio=(2.0, 2.0), max_share=limit)
        torch.manual_seed(0)
        crops = [augment(image, labels)[1] for _ in range(60)]
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
    right = total = 0
    ious, accs = [], []
    for label, name in enumerate("abcde"):
        both = either = true = 0
        for pred, labels in pairs:
            for p, t in zip(pred.flatten().tolist(), labels.flatten().tolist(), strict=True):
                if t != IGNORE:
                    both, either, true = both + (p == t == label), either + (label in (p, t)), true + (t == label)
        right, total = right + both, total + true
        if either:
            ious.append(100 * both / either)
            assert result["classes"][name]["IoU"] == pytest.approx(ious[-1])
        else:
            assert result["classes"][name] == {"IoU": None, "Acc": None}
        if true:
            accs.append(100 * both / true)
    assert result["mIoU"] == pytest.approx(np.mean(ious))
    assert result["mAcc"] == pytest.approx(np.mean(accs))
    assert result["aAcc"] == pytest.approx(100 * right / total)
    assert len(ious) == 4
    assert len(accs) == 3


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


def test_several_scales_and_mirrored_images_agree_on_what_each_sees():
    image = torch.zeros(3, 32, 48)
    image[0, :, 24:], image[0, 16:, :12] = 3.0, 1.0
    for arguments in ([], ["--ratios", 0.5, 1, 2, "--flip-test"]):
        config = config_of("toy", "--image-size", 32, "--stride", 21, *arguments)
        pred = segment.predict(config, Reds(), image)
        assert (pred == image[0].long()).float().mean() > 0.9


def test_the_recipe_of_beit_reaches_optimizer_schedule_and_model():
    config = config_of("beit", "--model-args", "depth=12 embed_dim=48 num_heads=3")
    model, _ = segment.build_model(config, 150)
    trunk = model.backbone.trunk
    optimizer = torch.optim.AdamW(param_groups(model, trunk, config), lr=config.lr)
    for group in optimizer.param_groups:
        group["lr"] *= group["lr_scale"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    lost = {name: 1 - p.detach().flatten()[0].item() for name, p in model.named_parameters()}
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
    model = segment.build_model(config_of("toy", *SMALL), 4)[0].eval()
    images, labels = torch.randint(255, (2, 3, 32, 32)), torch.full((2, 32, 32), IGNORE)
    prepare = {"prepare": lambda x: x.float() / 255}
    assert segment.losses(model, (images, labels), aux_weight=0.4, **prepare)["loss_main"] == 0
    labels[0] = 2
    one, two = (segment.losses(model, (images, labels), aux_weight=weight, **prepare) for weight in (0.4, 0.8))
    torch.testing.assert_close(2 * one["loss_aux"], two["loss_aux"])
    main = model(images.float() / 255)[0]
    expected = nn.functional.cross_entropy(main[:1], labels[:1]) / 2  # a mean over all pixels
    torch.testing.assert_close(one["loss_main"], expected)


def test_segmentation_learns_drawn_shapes_and_can_be_evaluated_at_several_scales(tmp_path):
    arguments = ["--preset", "toy", *SMALL, "--steps", 60, "--batch-size", 8, "--toy-images", 60, "--lr", 3e-3]
    arguments += ["--warmup-steps", 20, "--output-dir", "run"]
    result = run_script("segment.py", *arguments, folder=tmp_path)
    assert result.code == 0, result.err
    classes = json.loads((tmp_path / "run/results.json").read_text())["classes"]
    assert classes["background"]["IoU"] > 75  # about 70 where all is called background
    result = run_script("segment.py", *arguments, "--evaluate", "--ratios", 0.75, 1.25, "--flip-test", folder=tmp_path)
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "run/results.json").read_text())["classes"] != classes


def test_a_wrong_number_of_classes_ends_in_one_line_and_it_may_be_left_out(tmp_path):
    write_toy(tmp_path / "data", side=32, train=12, val=2)
    arguments = ["--preset", "toy", *SMALL, "--steps", 1, "--data", "data", "--output-dir", "run"]
    result = run_script("segment.py", *arguments, "--num-classes", 3, folder=tmp_path)
    assert result.code == 2 and result.err.count("\n") == 1
    assert "the number of classes must be 4, as data/classes.txt names them, got 3" in result.err
    (tmp_path / "data/classes.txt").unlink()
    result = run_script("segment.py", *arguments, "--no-reduce-zero-label", "--ignore-label", 2, 200, folder=tmp_path)
    assert result.code == 0, result.err
    assert list(json.loads((tmp_path / "run/results.json").read_text())["classes"]) == ["0", "1", "3", "4"]
    assert json.loads((tmp_path / "run/config.json").read_text())["num_classes"] == 4
