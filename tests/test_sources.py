"""Sources: every kind of data behind one string, junk left out, and nothing written beside the data."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pictures
import pytest
import torch
from pictures import write_tar
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from engine.signals import Stop
from mvmae.data import (
    ImageError,
    Loader,
    MultiViewDataset,
    MultiViewTransform,
    SplitError,
    StepSampler,
    decide_range,
    open_image,
    open_images,
)
from tasks.splits import open_labelled, open_splits


def encode(colour: int, file_format: str = "JPEG") -> bytes:
    return pictures.encode(Image.new("RGB", (24, 20), (colour, 60, 90)), file_format)


def write(path: Path, data: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data or encode(100))
    return path


def names(source) -> list[str]:
    return [Path(source.name(i)).name for i in range(len(source))]


def colours(source) -> list[int]:
    return [int(open_image(source[i][0]).decode()[..., 0].mean().round()) for i in range(len(source))]


def loads(source) -> bool:
    """Whether two batches of views come, without a bad image."""
    batches = list(Loader(MultiViewDataset(source, MultiViewTransform(16)), StepSampler(len(source), 2, num_steps=2)))
    return [batch.views.shape for batch in batches if not batch.bad] == [(2, 2, 3, 16, 16)] * 2


# Folders and lists


def test_a_flat_folder_has_all_images_in_order_and_no_labels(tmp_path):
    for i, name in enumerate(["b.jpg", "a.PNG", "c.JPEG", "d.webp"]):
        write(tmp_path / name, encode(50 * i, "PNG" if name == "a.PNG" else "JPEG"))
    source = open_images(str(tmp_path))
    assert names(source) == ["a.PNG", "b.jpg", "c.JPEG", "d.webp"]
    assert source.labels is None and source[0][1] is None
    assert source[3][0] == str(tmp_path / "d.webp") and loads(source)


@pytest.mark.posix
def test_odd_names_are_kept_and_junk_is_left_out_and_counted_in_one_line(tmp_path, caplog):
    odd = ["new\nline.jpg", "quo'te\".jpg", "$(touch pwned).jpg", "; rm -rf x.jpg", "ümlaut.jpg", "-n.jpg", "\udcff\udcfe.jpg"]
    for name in odd:
        write(tmp_path / "a" / name)
    hidden = (".hidden.jpg", "__MACOSX/._x.jpg", ".git/y.jpg", "lost+found/z.jpg")
    for junk in (*hidden, "README", "1.HEIC", "2.heic", "run/curves.png"):
        write(tmp_path / junk, b"junk")
    (tmp_path / "run/log.jsonl").touch()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    write(tmp_path / "pointer.jpg", pointer)
    write(tmp_path / "x.jpg" / "inside.jpg")
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(tmp_path / "fifo.jpg")
    source = open_images(tmp_path)
    assert sorted(names(source)) == sorted([*odd, "inside.jpg"])
    assert all(open_image(source[i][0]).decode().shape == (20, 24, 3) for i in range(len(source)))
    (line,) = caplog.messages
    ones = ("without extension", "Git LFS pointer", "broken link", "device", "folder of a run")
    for part in ("4 hidden", "2 .heic", *(f"1 {kind}" for kind in ones)):
        assert part in line and part in source.problems[0]
    assert not Path("pwned").exists()
    (tmp_path / "only").mkdir()
    write(tmp_path / "only" / "a.jpg", pointer)
    with pytest.raises(ValueError, match="holds no images: passed over 1 Git LFS pointer"):
        open_images(tmp_path / "only")


def test_a_split_that_is_not_there_is_told_from_data_that_cannot_be_read(tmp_path):
    write(tmp_path / "a" / "x.jpg")
    with pytest.raises(SplitError, match="no val split"):
        open_images(tmp_path, split="val")
    with pytest.raises(ValueError, match="split must be .*, got 'vla'"):
        open_images(tmp_path, split="vla")


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_images_are_known_by_content_without_an_extension_and_the_rest_is_counted(tmp_path, kind, caplog):
    files = {"n01440764_10026": encode(10, "PNG"), "photo.2023": encode(20, "TIFF"), "b.TIFF": encode(30, "TIFF")}
    files |= {"wrong.jpg": encode(40, "PNG"), "x.ico": encode(50, "ICO"), "README": b"Pictures of my cat, all taken by myself."}
    files |= {"._b.TIFF": b"hidden", "x.heic": b"left out", "y.HEIC": b"left out", "drawn.eps": b"%!PS-Adobe-3.0 EPSF-3.0"}
    for name, content in files.items():
        write(tmp_path / "files" / name, content)
    source = open_images(tmp_path / "files" if kind == "folder" else write_tar(tmp_path / "x.tar", files))
    assert sorted(colours(source)) == [10, 20, 30, 40, 50]
    (line,) = source.problems
    assert all(part in line for part in ("2 .heic", "1 .eps", "1 hidden", "1 without extension"))
    assert "2 .heic" in caplog.text and len(caplog.messages) == 1


def test_a_symlink_cycle_is_visited_once_and_files_keep_their_own_folder(tmp_path):
    write(tmp_path / "b" / "deep" / "x.jpg")
    write(tmp_path / "c" / "y.jpg")
    (tmp_path / "b" / "deep" / "up").symlink_to(tmp_path)
    (tmp_path / "a").symlink_to(tmp_path / "b" / "deep")
    source = open_images(tmp_path)
    assert [os.path.relpath(source.name(i), tmp_path) for i in range(len(source))] == ["b/deep/x.jpg", "c/y.jpg"]


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        *(("folder", "train", "val"), ("folder", "Training", "Testing"), ("folder", "train_set", "test")),
        *(("tar", "TRAIN", "Valid"), ("tar", "train_set", "test"), ("list", "Training", "Testing")),
    ],
)
def test_splits_are_whole_names_in_any_case_and_are_said(tmp_path, first, second, kind):
    if kind == "folder":
        for name in (f"{first}/a/1.jpg", f"{first}/b/1.jpg", f"{second}/a/1.jpg"):
            write(tmp_path / name)
    elif kind == "tar":
        write_tar(tmp_path / f"x-{first}-000.tar", {"1.jpg": encode(1), "2.jpg": encode(2)})
        write_tar(tmp_path / f"x-{second}-000.tar", {"1.jpg": encode(3)})
    else:
        write(tmp_path / "list.txt", f"{first}/a.jpg\n{second}/b.jpg\n{first}/c.jpg\n".encode())
        write(tmp_path / first / "a.jpg")
        write(tmp_path / second / "b.jpg")
    data = tmp_path / "list.txt" if kind == "list" else tmp_path
    train, val = open_images(data), open_images(data, split="val")
    assert (len(train), len(val)) == (2, 1)
    shown = ["train", "test"] if (kind, first) == ("tar", "train_set") else [first, second]  # words of a name
    said = f"train = {shown[0]}, validation = {shown[1]}"
    assert train.splits.lower() == val.splits.lower() == ("" if shown == ["train", "val"] else said.lower())


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train", "Training", "val"], "two names for one split, Training and train"),
        (["train", "bus", "car"], "holds train beside bus, so that train may be a split or a class: give the splits"),
        (["Test", "bus"], "holds Test beside bus, so that Test may be a split or a class"),
        (["test"], "holds test and no training split: name .*test itself"),
        (["train_images", "val_images"], "holds train_images and val_images, which may be splits or classes"),
        (["train_images", "test"], "holds test beside train_images"),
        (["bus/train", "bus/test", "car/train"], "bus holds splits, but .* does not"),
    ],
)
def test_what_may_be_a_split_or_a_class_stops(tmp_path, folders, message):
    for folder in folders:
        write(tmp_path / folder / "1.jpg")
        write(tmp_path / folder / "2.jpg")
    with pytest.raises(ValueError, match=message) as caught:
        open_images(tmp_path)
    assert not isinstance(caught.value, SplitError) and "\n" not in str(caught.value)


def test_names_that_only_hold_a_word_of_a_split_are_classes_and_what_lies_beside_splits_is_counted(tmp_path, caplog):
    for name in ("bullet_train", "test_tube", "car", "train station"):
        write(tmp_path / "classes" / name / "1.jpg")
    assert open_images(tmp_path / "classes").class_names == ("bullet_train", "car", "test_tube", "train station")
    for name in ("train/a/1.jpg", "val/a/1.jpg", "extra/1.jpg", "1.jpg", "annotations/1.xml"):
        write(tmp_path / "split" / name)
    assert len(open_images(tmp_path / "split")) == 1
    assert "passed over 2 folder beside train, 1 image beside train" in caplog.text
    for name in ("valley.tar", "trainee.tar"):  # no word of a split
        write_tar(tmp_path / name, {"1.jpg": encode(1)})
    assert len(open_images(f"{tmp_path}/{{valley,trainee}}.tar")) == 2


def labelled(kind, folder, classes, number):
    """Data of a kind, of which an image of `classes[i]` is `number[i]` bright."""
    datasets, rows = pytest.importorskip("datasets"), list(zip(classes, number, strict=True))
    if kind == "folder":
        for name, n in rows:
            write(folder / name / f"{n}.png", encode(n, "PNG"))
    elif kind == "tar":
        write_tar(Path(f"{folder}-0.tar"), {f"{name}/{n}.png": encode(n, "PNG") for name, n in rows})
    else:
        names = sorted(set(classes), key=classes.index)  # as they come: another number in each split
        columns = {"image": [{"bytes": encode(n, "PNG"), "path": None} for n in number]}
        columns["label"] = [names.index(name) for name in classes]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        datasets.Dataset.from_dict(columns, features=features).to_parquet(f"{folder}-0.parquet")


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_classes_of_the_splits_are_matched_by_name_and_unknown_ones_refused(tmp_path, kind):
    labelled(kind, tmp_path / "train", ["cat", "dog", "bee", "cat"], [1, 2, 3, 1])
    labelled(kind, tmp_path / "val", ["dog", "cat"], [2, 1])
    data = open_labelled(str(tmp_path))
    bright = {"cat": 1, "dog": 2, "bee": 3}
    for part in (data.train, data.val, open_splits(str(tmp_path)).val):
        assert [bright[part.class_names[label]] for label in part.labels] == colours(part)
    assert sorted(data.class_names) == ["bee", "cat", "dog"] and "validation lacks 1 of 3 classes (bee)" in data.note
    labelled(kind, tmp_path / "val", ["dog", "ant"], [2, 9])
    with pytest.raises(Stop, match="validation must have classes of training, got ant too"):
        open_labelled(str(tmp_path))


def test_labels_below_zero_are_none_and_equal_names_are_told_apart():
    source = open_images(Items(lambda i: np.zeros((8, 8), np.uint8), targets=[0, 1, -1, 1]))
    assert source.labels is None and source.problems == ("1 of 4 labels are empty: none is used",)
    source = open_images(Items(lambda i: np.zeros((8, 8), np.uint8), targets=[7, 3, 7, 3]))
    assert source.labels.tolist() == [1, 0, 1, 0] and source.class_names == ("3", "7")
    source = open_images(Items(lambda i: np.zeros((8, 8), np.uint8), targets=[0, 1, 2, 1], classes=["crane", "crane", "owl"]))
    assert len(set(source.class_names)) == 3


CALM = np.random.default_rng(0).random((20, 8, 9, 3)).astype(np.float32)
HOT = np.where(np.arange(20)[:, None, None, None] * (CALM > 0.999) > 0, np.float32(1.0003), CALM)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (HOT, (0, 1)),
        ((CALM * 30_000).astype(np.int16), (0, 32767)),
        ((CALM * 255).astype(np.uint8), None),
        ((CALM * 65535).astype(np.uint16), None),
        ([*CALM[:9], *(CALM[:9] * 255).astype(np.uint8)], (0, 1)),
        (CALM * 255, r"\[0\] holds pixels of type float32 from .* to 25.*, not 0 to 1: say .* by --value-range LOW HIGH"),
        ([*CALM, CALM[0] * 255], r"\[20\] holds pixels of type float32"),
        ((CALM * 9).astype(np.int32), "holds pixels of type int32 from 0 to 8: say what is black and white"),
        ([*CALM, (CALM[0] * 65535).astype(np.uint16)], "one range of pixels, got float32 of 0 to 1 .*, uint16 of 0 to 65535"),
    ],
)
def test_a_set_has_one_range_or_the_user_is_asked(images, expected, caplog):
    source = open_images([*images])
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            decide_range(source)
        return
    assert decide_range(source) == expected and len(caplog.messages) == (expected is not None)
    for index in range(len(source)):
        pixels = images[index] if images[index].dtype == np.uint8 else images[index].astype(float)
        if expected is not None and pixels.dtype != np.uint8:
            found = open_image(source[index][0]).decode(value_range=expected)
            assert np.abs(found - (pixels / expected[1]).clip(0, 1) * 255).max() < 0.51


def test_a_dark_set_of_12_bits_without_a_tag_is_said(caplog):
    assert decide_range(open_images([*(CALM * 4095).astype(np.uint16)])) is None
    assert "20 deep images of a sample all look black" in caplog.text and "--value-range" in caplog.text


@pytest.mark.parametrize("kind", ["absent", "empty", "other", "list", "text"])
def test_data_without_images_is_refused_with_its_path(tmp_path, kind):
    path = tmp_path / kind
    message = {"absent": "no such .*the current folder is ", "list": "must name images", "text": "is no"}
    message |= {"empty": "holds no images: it is empty", "other": r"holds no images: passed over 2 \.doc, 1 \.zip"}
    if kind in ("empty", "other"):
        (path / "below").mkdir(parents=True)
    for name in ("x.doc", "y.doc", "z.zip") if kind == "other" else ():
        write(path / "below" / name, b"x")
    if kind == "list":
        path = write(path.with_suffix(".txt"), b"\n \n")
    if kind == "text":
        path = write(path.with_suffix(".md"), b"x")
    with pytest.raises(ValueError, match=message[kind]) as caught:
        open_images(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_list_gives_paths_relative_to_its_folder(tmp_path):
    write(tmp_path / "images" / "a b.jpg")
    write(tmp_path / "c.jpg")
    lines = write(tmp_path / "list.txt", f"images/a b.jpg\r\n\n{tmp_path / 'c.jpg'}".encode())
    source = open_images(lines)
    assert names(source) == ["a b.jpg", "c.jpg"] and loads(source)
    write(tmp_path / "list.txt", b"\nnowhere.jpg\n")
    with pytest.raises(ValueError, match=r"list\.txt, line 2: no file .*nowhere\.jpg \(relative"):
        open_images(lines)


def test_a_fingerprint_changes_with_names_sizes_content_and_labels_and_not_with_the_place(tmp_path):
    write(tmp_path / "one" / "ab.jpg")
    write(tmp_path / "two" / "ab.jpg")
    prints = [open_images(tmp_path / folder).fingerprint for folder in ("one", "two")]
    assert prints[0] == prints[1]
    write(tmp_path / "two" / "c.jpg")
    assert open_images(tmp_path / "two").fingerprint != prints[0]
    (tmp_path / "two" / "c.jpg").unlink()
    content = bytearray((tmp_path / "one" / "ab.jpg").read_bytes())
    content[-3] ^= 1
    write(tmp_path / "two" / "ab.jpg", bytes(content))
    assert open_images(tmp_path / "two").fingerprint != prints[0]
    write(tmp_path / "one" / "ab.jpg", bytes(100_000))
    write(tmp_path / "two" / "ab.jpg", bytes(100_001))
    assert open_images(tmp_path / "one").fingerprint != open_images(tmp_path / "two").fingerprint
    plain = [(0, [0, 1, 0, 1]), (1, [0, 1, 0, 1]), (0, [0, 1, 1, 1]), (0, [0, 1, 0, 1])]
    arrays = [open_images(Items(lambda i, add=add: np.full((4, 4), i + add), targets=targets)) for add, targets in plain]
    assert len({source.fingerprint for source in arrays}) == 3 and arrays[0].fingerprint == arrays[3].fingerprint


# Archives


def test_a_tar_gives_every_image_without_unpacking_and_a_compressed_one_says_what_to_do(tmp_path):
    members = {f"k{i}.jpg": encode(40 * i) for i in range(5)} | {"k1.json": b"{}", "note.txt": b"x"}
    path = write_tar(tmp_path / "shard.tar", members)
    source = open_images(path)
    assert names(source) == [f"k{i}.jpg" for i in range(5)] and source.labels is None
    assert colours(source) == pytest.approx([40 * i for i in range(5)], abs=3)
    assert loads(source) and os.listdir(tmp_path) == [path.name]
    with pytest.raises(ValueError, match=r"shard\.tar\.gz is compressed.*gunzip"):
        open_images(write_tar(tmp_path / "shard.tar.gz", members, "w:gz"))


def test_shards_come_from_a_folder_or_braces_with_labels_from_cls(tmp_path):
    for split, count in (("train", 3), ("val", 1)):
        for s in range(count):
            members = {f"{s}{i}.jpg": encode(20 * i) for i in range(4)} | {f"{s}{i}.cls": b"%d" % i for i in range(4)}
            write_tar(tmp_path / f"{split}-{s:03d}.tar", members)
    folder = open_images(tmp_path)
    braces = open_images(f"{tmp_path}/train-{{000..002}}.tar")
    assert len(folder) == len(braces) == 12 and len(open_images(tmp_path, split="val")) == 4
    assert folder.labels.tolist() == [0, 1, 2, 3] * 3 and folder.fingerprint == braces.fingerprint
    with pytest.raises(ValueError, match=r"1 of 4 shards .* the first is .*train-003\.tar"):
        open_images(f"{tmp_path}/train-{{000..003}}.tar")


def test_shards_by_webdatasets_own_writer_are_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as sink:
        for i in range(3):
            sink.write({"__key__": f"a/{i}", "png": encode(30 * i, "PNG"), "cls": i, "json": {"i": i}})
    source = open_images(tmp_path / "x.tar")
    assert colours(source) == [0, 30, 60] and source.labels.tolist() == [0, 1, 2]


def test_folders_in_a_tar_are_classes(tmp_path):
    source = open_images(write_tar(tmp_path / "x.tar", {"./b/1.jpg": encode(1), "./a/1.jpg": encode(2)}))
    assert source.labels.tolist() == [1, 0] and source.class_names == ("a", "b")


def test_members_that_point_outside_touch_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    secret = write(tmp_path / "secret.jpg")
    path = write_tar(tmp_path / "in" / "x.tar", {"../../up.jpg": encode(10), "/etc/absolute.jpg": encode(20)})
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo("link.jpg")
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    source = open_images(path)
    assert colours(source) == pytest.approx([10, 20], abs=3)
    assert sorted(tmp_path.rglob("*")) == before and not Path("/etc/absolute.jpg").exists()


@pytest.mark.parametrize(("damage", "whole"), [("cut", 5), ("no mark", 9), ("header", 5), ("size", 5)])
def test_a_damaged_shard_is_named_and_its_whole_images_are_used(tmp_path, damage, whole):
    path = write_tar(tmp_path / "bad.tar", {f"{i}.png": encode(i, "PNG") for i in range(9)})
    write_tar(tmp_path / "good.tar", {"g.jpg": encode(7)})
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        sixth, last = tar.getmembers()[5].offset, tar.getmembers()[8].offset + 1024
    if damage == "size":  # one that lies
        header = tarfile.TarInfo("5.png")
        header.size = 10**12
        content[sixth : sixth + 512] = header.tobuf(tarfile.GNU_FORMAT)[:512]
    elif damage == "header":
        content[sixth : sixth + 512] = b"x" * 512
    path.write_bytes(content[: {"cut": sixth + 520, "no mark": last}.get(damage)])
    source = open_images(f"{tmp_path}/{{bad,good}}.tar")
    assert names(source) == [*(f"{i}.png" for i in range(whole)), "g.jpg"]
    assert len(source.problems) == 1 and str(path) in source.problems[0] and f"its {whole} whole members" in source.problems[0]
    assert all(open_image(source[i][0]).decode().ndim == 3 for i in range(len(source)))


def test_archives_without_images_or_of_two_kinds_or_beside_images_are_refused(tmp_path):
    for path in (write_tar(tmp_path / "x.tar", {"x.txt": b"1"}), write(tmp_path / "y.tar", b"<html>")):
        with pytest.raises(ValueError, match=f"no images in {path}"):
            open_images(path)
    write(tmp_path / "z.parquet", b"<html>")
    with pytest.raises(ValueError, match="must hold archives of one kind, got tar files and tables"):
        open_images(tmp_path)
    write(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match="must hold images or archives, got both"):
        open_images(tmp_path)


def test_a_shard_that_goes_away_is_a_bad_image(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"x.jpg": encode(1)})
    source = open_images(path)
    path.unlink()
    with pytest.raises(ImageError, match="FileNotFound"):
        source[0]


def hugging_face(labelled: bool):
    datasets = pytest.importorskip("datasets")
    columns = {"image": [{"bytes": encode(40 * i), "path": None} for i in range(6)]}
    features = {"image": datasets.Image()}
    if labelled:
        columns["label"] = [i % 2 for i in range(6)]
        features["label"] = datasets.ClassLabel(names=["cat", "dog"])
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.mark.parametrize("labelled", [True, False])
def test_parquet_and_arrow_of_hugging_face_with_and_without_labels(tmp_path, labelled):
    dataset = hugging_face(labelled)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    dataset.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00002.parquet")
    dataset.to_parquet(tmp_path / "hub" / "data" / "train-00001-of-00002.parquet")
    dataset.to_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
    dataset.save_to_disk(str(tmp_path / "saved"))
    for source, count in (
        (open_images(tmp_path / "hub"), 12),
        (open_images(tmp_path / "hub", split="val"), 6),
        (open_images(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet"), 6),
        (open_images(tmp_path / "saved"), 6),
        (open_images(dataset), 6),
    ):
        assert len(source) == count and loads(source)
        assert colours(source)[:6] == pytest.approx([40 * i for i in range(6)], abs=3)
        assert (source.labels is not None) == labelled
        if labelled:
            assert source.labels.tolist() == [0, 1] * (count // 2)
            assert source.class_names == ("cat", "dog")


def arrow(path: Path, images: list[bytes | None], labels: list[int | None]) -> Path:
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"image": pa.array(images, pa.binary()), "label": pa.array(labels, pa.int64())})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return path


def test_f64_an_arrow_file_with_wrong_offsets_is_refused(tmp_path):
    path = arrow(tmp_path / "x.arrow", [encode(10), encode(20), encode(30)], [0, 1, 2])
    content = path.read_bytes()
    offsets = np.cumsum([0, len(encode(10)), len(encode(20)), len(encode(30))]).astype("<i4")
    at = content.index(offsets.tobytes())
    assert len(open_images(path)) == 3
    offsets[2] = 2**31 - 1
    path.write_bytes(content[:at] + offsets.tobytes() + content[at + 16 :])
    code = "import sys; from mvmae.data import open_images; source = open_images(sys.argv[1])\n"
    code += "for i in range(len(source)): source[i]"  # in a process of its own, which it would take along
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and f"ValueError: {path} cannot be read: " in done.stderr


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_f64_empty_labels_are_no_class(tmp_path, kind, caplog):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = arrow(tmp_path / "x.arrow", [encode(10), encode(20)], [None, 1])
    if kind == "parquet":
        table = pa.ipc.open_stream(path.read_bytes()).read_all()
        path = tmp_path / "x.parquet"
        pq.write_table(table, path)
    source = open_images(path)
    assert source.labels is None and source.class_names == () and len(source) == 2
    assert "1 of 2 labels are empty: none is used" in caplog.text and source.problems[0] in caplog.text


def test_parquet_that_is_none_or_without_images_is_refused(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    write(tmp_path / "a.parquet", b"<html>")
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read"):
        open_images(tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": [1, 2]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet must have a column of images .*, got x"):
        open_images(tmp_path / "b.parquet")


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()


# timm's names, torch data sets, the sample


def test_timm_names_open_torchvisions_and_hugging_faces_data(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    array = np.arange(4 * 784).reshape(4, 28, 28).astype(np.uint8)
    raw = tmp_path / "FashionMNIST" / "raw"
    for prefix in ("train", "t10k"):
        write(raw / f"{prefix}-images-idx3-ubyte", idx(array))
        write(raw / f"{prefix}-labels-idx1-ubyte", idx(np.array([0, 1, 2, 3], np.uint8)))
    source = open_images(f"torch/fashion_mnist:{tmp_path}")
    assert source.labels.tolist() == [0, 1, 2, 3] and loads(source)
    assert len(open_images(f"torch/fashion_mnist:{tmp_path}", split="val")) == 4
    (tmp_path / "hub").mkdir()
    hugging_face(False).to_parquet(tmp_path / "hub" / "train.parquet")
    source = open_images(f"hfds/{tmp_path / 'hub'}:{tmp_path / 'cache'}")
    assert len(source) == 6 and source.labels is None and loads(source)


def test_timm_names_that_cannot_be_opened_say_why(tmp_path):
    with pytest.raises(ValueError, match="torch/cifar10:FOLDER"):
        open_images("torch/cifar10")
    with pytest.raises(ValueError, match=r"torch/cifar10:.* cannot be opened as split train: Dataset not found"):
        open_images(f"torch/cifar10:{tmp_path}")


class Items(Dataset):
    def __init__(self, make, **attributes):
        self.make = make
        vars(self).update(attributes)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.make(index)


def test_any_torch_data_set_is_a_source():
    for make in (
        lambda i: Image.new("RGB", (24, 20), (10 * i, 0, 0)),
        lambda i: torch.full((3, 20, 24), 10 * i, dtype=torch.uint8),
        lambda i: torch.full((3, 20, 24), 10 * i / 255),
        lambda i: np.full((20, 24, 3), 10 * i, np.uint8),
        lambda i: torch.full((20, 24), 10 * i, dtype=torch.uint8),
        lambda i: (encode(10 * i, "PNG"), i),
        lambda i: (Image.new("L", (24, 20), 10 * i), i, "more"),
        lambda i: {"image": np.full((20, 24), 10 * i, np.uint8), "label": i},
    ):
        source = open_images(Items(make, targets=[3, 2, 1, 0], classes=list("abcd")))
        assert colours(source) == [0, 10, 20, 30] and loads(source)
    assert source.labels.tolist() == [3, 2, 1, 0] and source.class_names == tuple("abcd") and source[0][1] == 3
    assert open_images(source) is source and source.name(2) == "Items[2]"


def test_a_data_set_may_have_no_labels_and_must_have_an_index():
    data = TensorDataset(torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    source = open_images(data)
    assert source.labels is None and len(source) == 4 and source.fingerprint.startswith("4-")
    with pytest.raises(SplitError):
        open_images(data, split="val")
    with pytest.raises(TypeError, match="must have a length and an index, got .*: use one .* with which runs can resume"):
        open_images(type("Stream", (IterableDataset,), {"__iter__": lambda self: iter(())})())


@pytest.mark.parametrize("column", ["picture", "img"])
def test_a_hugging_face_data_set_is_read_by_the_type_of_its_columns_as_parquet_is(tmp_path, column):
    dataset = hugging_face(True).rename_columns({"image": column, "label": "fine_label"})
    dataset.to_parquet(tmp_path / "x.parquet")
    for source in (open_images(dataset), open_images(tmp_path / "x.parquet")):
        assert colours(source) == pytest.approx([40 * i for i in range(6)], abs=3) and loads(source)
        assert source.labels.tolist() == [0, 1] * 3 and source.class_names == ("cat", "dog")


def test_items_without_an_image_name_their_columns():
    with pytest.raises(ValueError, match="no image among the columns text, size"):
        open_images(Items(lambda i: {"text": "a", "size": 3}))[0]


def test_the_sample_holds_labelled_tiles_and_others_that_share_no_pixel():
    pytest.importorskip("skimage")
    train, val = open_images("sample"), open_images("sample", split="val")
    assert len(train) == 896 and len(val) == 504 and train.class_names == val.class_names
    assert np.bincount(train.labels).tolist() == [64] * 14 and np.bincount(val.labels).tolist() == [36] * 14
    tiles = {source.name(i): source[i][0] for source in (train, val) for i in range(len(source))}
    assert len(tiles) == 1400 and all(min(tile.shape[:2]) >= 30 for tile in tiles.values())
    rows = [np.hstack([tiles[f"camera.png#{10 * row + column}"] for column in range(10)]) for row in range(10)]
    import skimage

    whole = open_image(Path(skimage.__file__).parent / "data" / "camera.png").decode()
    np.testing.assert_array_equal(np.vstack(rows), whole[:510, :510])  # each pixel once
    assert train.fingerprint != val.fingerprint and loads(train)


def test_numbers_outside_are_index_errors(tmp_path):
    write(tmp_path / "x.jpg")
    source = open_images(tmp_path)
    for index in (1, -1):
        with pytest.raises(IndexError, match=f"image {index} of 1"):
            source[index]


@pytest.mark.parametrize(("package", "data"), [("skimage", "sample"), ("pyarrow", "x.parquet")])
def test_an_absent_optional_package_names_the_extra(monkeypatch, tmp_path, package, data):
    write(tmp_path / "x.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "mvmae\[train\]"'):
        open_images(data)
