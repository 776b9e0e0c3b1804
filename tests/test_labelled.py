"""examples/tasks/labelled.py and splits.py: two splits of labelled images, augmentation by one generator, accuracy."""

import random
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from running import EXAMPLES
from sklearn.metrics import log_loss, top_k_accuracy_score

sys.path.append(str(EXAMPLES))
from engine.distributed import Ranks
from engine.signals import Stop
from mvmae.data import EvalTransform
from mvmae.data.features import to_pil
from tasks.features import Pooled, extract
from tasks.labelled import TrainTransform, accuracy
from tasks.splits import hold_out, open_labelled, open_splits

ONE = Ranks(0, 1, torch.device("cpu"), None)


def write_classes(folder, counts, size=(40, 36)):
    """Writes images whose red tells the class and whose green tells the number in it."""
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", size, (50 * label, i, 0)).save(folder / name / f"{i:03}.png")


def shown(part):
    """What the images of a split show: (class, number)."""
    return [(red // 50, green) for red, green, _ in (to_pil(part[i][0]).getpixel((0, 0)) for i in range(len(part)))]


def test_a_folder_without_a_validation_split_is_split_the_same_way_always(tmp_path):
    write_classes(tmp_path, {"ant": 40, "bee": 5, "cat": 1})
    data = open_labelled(str(tmp_path))
    assert "no validation split: one image of ten of each class is held out" in data.note
    train, val = shown(data.train), shown(data.val)
    assert not set(train) & set(val) and len(train) + len(val) == 46
    assert [sum(label == i for label, _ in val) for i in range(3)] == [4, 1, 0]
    assert [label for label, _ in train] == data.train.labels.tolist()
    assert [label for label, _ in val] == data.val.labels.tolist()
    torch.manual_seed(1)
    random.seed(1)
    again = open_labelled(str(tmp_path))
    assert shown(again.val) == val and again.val.fingerprint == data.val.fingerprint != data.train.fingerprint


@pytest.mark.parametrize("counts", [[200], [40, 5, 1], [10] * 7, [2] * 30, [1] * 9 + [3], [1, 1], [1, 2, 3, 50], [7, 7]])
def test_a_tenth_is_held_out_of_every_class_that_has_images_for_it(counts):
    labels = torch.cat([torch.full((count,), 3 * label - 1) for label, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels))]
    train, held = hold_out(labels)
    assert torch.equal(torch.cat([train, held]).sort().values, torch.arange(len(labels)))
    several = sum(count for count in counts if count > 1) if len(counts) > 1 else 0
    assert len(held) == -(-several // 10)  # a tenth of all, small classes included
    for label, count in enumerate(counts):
        taken = int((labels[held] == 3 * label - 1).sum())
        assert count // 10 * (len(counts) > 1) <= taken <= min(-(-count // 10), count - 1), counts
    assert all(torch.equal(*pair) for pair in zip(hold_out(labels), (train, held), strict=True))


def test_all_scripts_hold_the_same_images_out_and_unlabelled_folders_lose_none(tmp_path):
    write_classes(tmp_path / "classes", {"ant": 25, "bee": 25})
    write_classes(tmp_path / "one", {"ant": 12})
    write_classes(tmp_path / "split" / "train", {"ant": 12, "bee": 12})
    write_classes(tmp_path / "split" / "val", {"ant": 1, "bee": 2})
    splits, data = open_splits(str(tmp_path / "classes")), open_labelled(str(tmp_path / "classes"), train_images=20)
    assert shown(splits.val) == shown(data.val) and len(splits.val) == 5 and len(splits.train) == 45
    assert set(shown(data.train)) < set(shown(splits.train)) and splits.note in data.note
    assert splits.train.labels.tolist() == [label for label, _ in shown(splits.train)]
    flat, deep = tmp_path / "one" / "ant", tmp_path / "one"
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in sorted((tmp_path / "classes").rglob("*.png"))))
    for place, count in ((flat, 12), (deep, 12), (tmp_path / "list.txt", 50)):
        train, val, note = open_splits(str(place))
        assert val is None and len(train) == count and "no image is held out" in note
    train, val, note = open_splits(str(tmp_path / "split"))
    assert (len(train), len(val), note) == (24, 3, "the data's validation split")
    data = open_labelled(str(tmp_path / "split"))
    assert data.class_names == ("ant", "bee") and "24 images, tested on 3, of 2 classes" in data.note and note in data.note
    assert [label for label, _ in shown(data.val)] == data.val.labels.tolist() == [0, 1, 1]
    sample = open_splits("sample")
    assert (len(sample.train), len(sample.val), sample.note) == (896, 504, "the data's validation split")


def test_a_data_set_by_name_without_a_validation_split_is_told_from_one_that_cannot_be_read(monkeypatch):
    def create(name, split, **_):
        if split != "train" and "labelled" in name:
            raise ValueError(f"Unknown split {split!r}. Should be one of ['train'].")
        if split != "train":
            raise OSError("the disk is gone")
        return [(Image.new("RGB", (8, 8)), 0)] * 4

    monkeypatch.setattr("timm.data.create_dataset", create)
    assert open_splits("hfds/labelled").val is None
    with pytest.raises(ValueError, match="the disk is gone"):
        open_splits("hfds/other")


def test_fewer_images_are_drawn_once_and_a_part_of_more(tmp_path):
    few, more = (open_labelled("sample", train_images=n, val_images=n) for n in (50, 200))
    assert len(few.train) == len(few.val) == 50 and few.train.labels.max() <= 13 and len(few.class_names) == 14
    assert set(few.train.indices.tolist()) < set(more.train.indices.tolist())
    assert len(np.unique(few.train.labels)) > 8


def test_data_without_classes_is_refused(tmp_path):
    write_classes(tmp_path / "one", {"ant": 3})
    for folder in (tmp_path / "one", tmp_path / "one" / "ant"):
        with pytest.raises(Stop, match="must have labels|must have two or more classes"):
            open_labelled(str(folder))


def test_a_transform_is_that_of_timm_and_depends_on_its_generator_alone(tiny_vit):
    augment = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel"}
    vit = tiny_vit()
    vit.pretrained_cfg |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    transform = TrainTransform(vit, **augment)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 70, 3), dtype=np.uint8))
    reference = timm.data.create_transform(32, is_training=True, interpolation="bicubic", color_jitter=None, **augment)
    results = []
    for seed in range(20):
        results.append(transform(image, generator=torch.Generator().manual_seed(seed)))
        drawn = int(torch.randint(2**32, (), generator=torch.Generator().manual_seed(seed)))
        random.seed(drawn)
        np.random.seed(drawn)
        torch.manual_seed(drawn)
        with_timm = reference(image)
        assert torch.equal(results[-1], with_timm) and results[-1].shape == (3, 32, 32)
    again = transform(image, generator=torch.Generator().manual_seed(7))
    assert torch.equal(again, results[7]) and not torch.equal(results[6], results[7])


def test_evaluation_resizes_to_eight_sevenths_and_crops_the_centre(tiny_vit):
    vit = tiny_vit(img_size=224, patch_size=16)
    vit.pretrained_cfg |= {"crop_pct": 0.875, "interpolation": "bicubic", "mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))
    resized = image.resize((341, 256), Image.Resampling.BICUBIC).crop((58, 16, 58 + 224, 16 + 224))
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255
    mean, std = torch.tensor([[0.4, 0.5, 0.6], [0.1, 0.2, 0.3]])[:, :, None, None]
    result = EvalTransform(vit)(image)
    assert torch.allclose(result, (expected - mean) / std, atol=1e-5)


def test_posterizing_to_nothing_does_not_end_a_run(tiny_vit):
    transform = TrainTransform(tiny_vit(img_size=8), auto_augment="rand-m10-n4-inc1")
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    for seed in range(60):  # a quarter of these ask for 0 bits, which Pillow refuses
        transform(image, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_read_are_named_and_left_out(tmp_path, tiny_vit, workers, caplog):
    write_classes(tmp_path, {"ant": 12, "bee": 12})
    (tmp_path / "ant" / "003.png").write_bytes(b"no image")
    part, vit = open_labelled(str(tmp_path)).train, tiny_vit().train()
    readable = [i for i in range(len(part)) if not part.name(i).endswith("ant/003.png")]
    features, labels = extract(Pooled(vit), part, EvalTransform(vit, 32), ONE, batch_size=5, workers=workers)
    assert labels.tolist() == part.labels[readable].tolist() and features.shape == (len(part) - 1, 48)
    assert "ant/003.png" in caplog.text and caplog.text.count("bad image") == 1 and vit.training
    with pytest.raises(Stop, match="1 images cannot be read, more than the 0"):
        extract(Pooled(vit), part, EvalTransform(vit, 32), ONE, max_bad=0)


def test_accuracy_is_that_of_scikit_learn():
    logits, labels = torch.randn(300, 9), torch.randint(9, (300,))
    found, scores, classes = accuracy(logits, labels), logits.softmax(1).double().numpy(), list(range(9))
    assert found["top1"] == pytest.approx(100 * top_k_accuracy_score(labels, scores, k=1))
    assert found["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, scores, k=5))
    scores /= scores.sum(1, keepdims=True)
    assert found["val_loss"] == pytest.approx(log_loss(labels, scores, labels=classes), rel=1e-5)
    assert accuracy(logits[:, :3], labels % 3)["top5"] == 100  # fewer classes than five
