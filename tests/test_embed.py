"""examples/embed.py and mvmae.embed: features of all images, the same as timm's own, in order, none lost or repeated."""

import os
import re
import signal
import sys
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from running import EXAMPLES, run_script
from tiny_run import write_images

import mvmae
from mvmae import hub
from mvmae.data import DatasetSource, EvalTransform, open_images
from mvmae.metrics import knn_accuracy

sys.path.append(str(EXAMPLES))
from engine.distributed import Ranks
from tasks.feature_files import Parts
from tasks.features import Pooled, extract
from tasks.probe import measure

COUNT = 20
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
ARGUMENTS = ["--data", "images", "--model", "encoder", "--device", "cpu", "--workers", 0]
PARTS = ["--save-every", 6, "--batch-size", 4]
"""Four parts, of two batches each but for the last."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images of two classes, and an export."""
    place = tmp_path_factory.mktemp("embed")
    for name in ("a", "b"):
        (place / "images" / name).mkdir(parents=True)
    for number, path in enumerate(sorted(write_images(place, COUNT).glob("*.jpg"))):
        path.rename(place / "images" / "ab"[number % 2] / path.name)
    torch.manual_seed(0)
    hub.export(timm.create_model("mvmae_vit_tiny_patch16", **TINY), place / "encoder")
    return place


@pytest.fixture(scope="module")
def paths(place):
    return sorted(place.glob("images/*/*"), key=str)


@pytest.fixture(scope="module")
def written(place):
    """The features that are written in one go."""
    done = run_script("embed.py", *ARGUMENTS, *PARTS, "--output-dir", "whole", folder=place)
    assert done.code == 0 and done.err == "", done.err
    assert re.search(r"\n20 images, features in whole/features\.npy; [\d.]+ images/s\n$", done.out)
    assert {path.name for path in (place / "whole").glob("[!.]*")} == {"config.json", "features.npy", "names.txt"}
    return np.load(place / "whole" / "features.npy")


def timms_own(model, paths):
    """The pooled feature of each image, alone, by timm's transform of the image as Pillow reads it."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        return torch.cat([model(transform(Image.open(path).convert("RGB"))[None]) for path in paths])


def test_rows_are_timms_own_features_of_the_images_in_order(place, paths, written):
    encoder = timm.create_model(f"local-dir:{place}/encoder", pretrained=True).eval()
    own = timms_own(encoder, paths)
    assert written.dtype == np.float32 and written.shape == (COUNT, 48)
    np.testing.assert_allclose(written, own, atol=1e-5, rtol=0)
    assert np.abs(written[0] - written[1:]).max(axis=1).min() > 1e-3, "a row could stand for another"
    names = [line.encode().decode("unicode_escape") for line in (place / "whole/names.txt").read_text().splitlines()]
    assert [place / name for name in names] == paths
    found = mvmae.embed(place / "encoder", place / "images", batch_size=7)
    assert found.names == list(map(str, paths)) and found.features.dtype == torch.float32
    torch.testing.assert_close(found.features.cpu(), own, atol=1e-5, rtol=0)
    # what pretrain.py evaluates with and linear_probe.py trains on
    source, one = open_images(place / "images"), Ranks(0, 1, torch.device("cpu"), None)
    for pool in ("avg", "model"):
        features, labels = extract(Pooled(encoder, pool), source, EvalTransform(encoder), one, batch_size=3)
        torch.testing.assert_close(features, own, atol=1e-5, rtol=0)
    assert labels.tolist() == [0] * 10 + [1] * 10
    val = (torch.from_numpy(written), labels)
    assert measure((features, labels), val)["knn"] == pytest.approx(100 * knn_accuracy(own, labels, own, labels, k=20))


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_siglip_mini", "convnext_atto", "mvmae"])
def test_the_feature_is_what_timm_pools_and_the_mean_patch_token_of_this_package(place, paths, tiny_vit, name):
    kinds = {"vit_tiny_patch16_siglip_mini": {"global_pool": "map"}, "mvmae": {"global_pool": "avg", "fc_norm": False}}
    model = tiny_vit(**kinds[name]) if name in kinds else timm.create_model(name, num_classes=7)
    size = 32 if name in kinds else 48
    found = mvmae.embed(model.train(), place / "images", image_size=0 if name in kinds else size, batch_size=3).features[:4]
    assert all(module.training for module in model.modules()), "the model is left as it was"
    transform = timm.data.create_transform(**{**timm.data.resolve_model_data_config(model), "input_size": (3, size, size)})
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths[:4]])
    with torch.no_grad():
        maps = model.eval().forward_features(images)
        wanted = model.forward_head(maps, pre_logits=True)
        if name == "mvmae":
            torch.testing.assert_close(wanted, maps[:, 1:].mean(dim=1))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_another_size_suits_a_model_that_is_named_and_is_told_for_one_that_is_given(place, paths, tiny_vit):
    name = "mvmae_vit_micro_patch8_64"
    found = mvmae.embed(name, place / "images", image_size=96).features
    model = timm.create_model(name, pretrained=True, img_size=96).eval()
    transform = timm.data.create_transform(**{**timm.data.resolve_model_data_config(model), "input_size": (3, 96, 96)})
    with torch.no_grad():
        wanted = model(torch.stack([transform(Image.open(path).convert("RGB")) for path in paths]))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"image_size 96 is not the \(32, 32\) of the model: call model\.set_input_size"):
        mvmae.embed(tiny_vit(), place / "images", image_size=96)
    with pytest.raises(ValueError, match="not of features_only"):
        mvmae.embed(timm.create_model("resnet18", features_only=True), place / "images")


def test_parquet_holds_names_features_and_labels_for_pandas(place, paths, written):
    arrow = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    done = run_script("embed.py", *ARGUMENTS, *PARTS, "--format", "parquet", "--output-dir", "table", folder=place)
    assert done.code == 0, done.err
    table = arrow.read_table(place / "table/features.parquet")
    assert str(table.schema.field("features").type) == "fixed_size_list<element: float>[48]"
    columns = table.to_pydict()
    assert list(columns) == ["name", "features", "label"]
    assert np.array_equal(np.stack(list(columns["features"])), written)
    assert [place / name for name in columns["name"]] == paths
    assert list(columns["label"]) == [0] * 10 + [1] * 10


def end_in_the_third_part(number):
    """Sends this process a signal when it has saved two parts and half of the third."""
    import tasks.feature_files as files

    replace, calls = files.replace_file, []

    def cut(path, write):
        calls.append(path.suffix == ".npz")
        if sum(calls) == 3:
            path.with_name(f".{path.name}.{os.getpid()}.part").write_bytes(b"half")
            os.kill(os.getpid(), number)
        replace(path, write)

    files.replace_file = cut


@pytest.mark.posix
def test_a_killed_run_goes_on_and_computes_a_damaged_foreign_or_odd_part_again(place, written):
    typed = [*ARGUMENTS, *PARTS, "--output-dir", "cut"]
    killed = run_script("embed.py", *typed, folder=place, patch=partial(end_in_the_third_part, signal.SIGKILL))
    assert killed.code == -signal.SIGKILL and not (place / "cut/features.npy").exists()
    saved = sorted(place.glob("cut/features-parts/0*"))
    assert len(saved) == 2
    with np.load(saved[1]) as part:
        own = Parts(place / "cut", str(part["of"]))
    saved[0].write_bytes(saved[0].read_bytes()[:-9])  # a disk that lost the end of a file
    Parts(place / "cut", "another model").write(range(12, 18), np.zeros((6, 48), np.float32), {})
    own.write(range(18, 20), np.zeros((3, 48), np.float32), {})
    refused = run_script("embed.py", *typed, folder=place)
    assert refused.code == 2 and "error: cut holds features already: add --resume" in refused.err
    other = run_script("embed.py", *typed, "--resume", "--pool", "token", folder=place)
    assert other.code == 2 and "pool was 'model' and is 'token' now" in other.err and other.err.count("\n") == 1
    done = run_script("embed.py", *typed, "--resume", "--batch-size", 5, folder=place)
    assert done.code == 0 and "resuming cut: 6 of 20 images are done" in done.out, done.err
    for number, reason in ((0, "damaged"), (12, "of another model or other images"), (18, "(3, 48) in place of 2 rows")):
        assert re.search(rf"warning: cut/features-parts/0*{number}.npz .*{re.escape(reason)}.*: it is computed again", done.err)
    assert done.err.count("\n") == 3
    np.testing.assert_allclose(np.load(place / "cut/features.npy"), written, atol=1e-6, rtol=0)
    assert (place / "cut/names.txt").read_bytes() == (place / "whole/names.txt").read_bytes()
    assert not (place / "cut/features-parts").exists()
    again = run_script("embed.py", *typed, "--resume", folder=place)
    assert again.code == 0 and again.out.endswith("cut/features.npy is complete\n")
    torch.manual_seed(1)
    hub.export(timm.create_model("mvmae_vit_tiny_patch16", **TINY), place / "changed")
    other = run_script("embed.py", *typed, "--model", "changed", "--resume", folder=place)
    assert other.code == 2 and "the weights are not those of the start" in other.err


@pytest.mark.posix
def test_a_signal_saves_the_part_and_the_run_goes_on(place, written):
    typed = [*ARGUMENTS, *PARTS, "--output-dir", "two"]
    stopped = run_script("embed.py", *typed, folder=place, patch=partial(end_in_the_third_part, signal.SIGTERM))
    assert stopped.code == 128 + signal.SIGTERM and "--resume continues" in stopped.err and stopped.err.count("\n") == 1
    done = run_script("embed.py", *typed, "--resume", "--workers", 1, folder=place)
    assert done.code == 0 and "resuming two: 18 of 20 images are done" in done.out, done.err
    assert np.array_equal(np.load(place / "two/features.npy"), written)


def test_the_row_of_an_unreadable_image_is_nan_and_its_name_is_listed(place, paths, written, tmp_path):
    (tmp_path / "images").mkdir()
    for number, path in enumerate(paths):
        (tmp_path / "images" / f"{number:02}.jpg").write_bytes(b"<html>" if number in (3, 9) else path.read_bytes())
    (tmp_path / "encoder").symlink_to(place / "encoder")
    few = run_script("embed.py", *ARGUMENTS, *PARTS, "--max-bad", 1, folder=tmp_path)
    assert few.code == 1 and "error: 2 images cannot be read, more than the 1 that --max-bad allows\n" in few.err
    done = run_script("embed.py", *ARGUMENTS, *PARTS, "--max-bad", 2, "--resume", folder=tmp_path)
    assert done.code == 0 and "2 cannot be read: rows of NaN, listed in runs/features/bad_files.txt" in done.out
    assert "'images/09.jpg'" in done.err and done.err.count("\n") == 1, "the first is saved already"
    found = np.load(tmp_path / "runs/features/features.npy")
    assert np.isnan(found).all(axis=1).nonzero()[0].tolist() == np.isnan(found).any(axis=1).nonzero()[0].tolist() == [3, 9]
    kept = [row for row in range(COUNT) if row not in (3, 9)]
    np.testing.assert_allclose(found[kept], written[kept], atol=1e-6, rtol=0)
    listed = [line.split("\t") for line in (tmp_path / "runs/features/bad_files.txt").read_text().splitlines()]
    assert [name for name, _ in listed] == ["images/03.jpg", "images/09.jpg"] and all(reason for _, reason in listed)


def test_unreadable_images_are_logged_in_python(tiny_vit, caplog):
    images = DatasetSource([Image.new("RGB", (40, 40)), b"<html>", Image.new("RGB", (40, 40), "red")])
    found = mvmae.embed(tiny_vit(), images)
    assert found.features.isnan().all(dim=1).tolist() == [False, True, False] and not found.features[[0, 2]].isnan().any()
    assert "bad image 'list[1]'" in caplog.text
    assert list(found.bad) == [1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "empty"], "--data: empty holds no images: it is empty"),
        (["--data", "images", "--model", "vit_tiny_patch61_224"], "timm has no model 'vit_tiny_patch61_224'"),
        (["--data", "images", "--model", "runs/nothing"], "there is no file or folder runs/nothing"),
        (["--data", "images", "--model", "encoder", "--split", "val"], "images has no val split"),
    ],
)
def test_a_mistake_ends_in_one_line_and_leaves_no_folder(place, arguments, words):
    (place / "empty").mkdir(exist_ok=True)
    done = run_script("embed.py", *arguments, "--output-dir", "none", folder=place)
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1 and words in done.err, done.err
    assert not (place / "none").exists()


def test_another_programs_features_are_not_overwritten(place):
    (place / "theirs").mkdir()
    (place / "theirs/features.npy").write_bytes(b"theirs")
    done = run_script("embed.py", *ARGUMENTS, "--output-dir", "theirs", "--resume", folder=place)
    assert done.code == 2 and "theirs/features.npy is of another program" in done.err
    assert (place / "theirs/features.npy").read_bytes() == b"theirs"


def test_what_cannot_be_embedded_is_refused(place, tiny_vit):
    with pytest.raises(ValueError, match=r"must pool its features to \(B, D\), got \(20, 17, 48\)"):
        mvmae.embed(tiny_vit(global_pool=""), place / "images")
    with pytest.raises(ValueError, match="batch size must be at least 1, got 0"):
        mvmae.embed(tiny_vit(), place / "images", batch_size=0)


def test_a_part_is_read_as_it_was_written_or_not_at_all(tmp_path):
    parts, rows = Parts(tmp_path, "a model"), range(3, 6)
    features, bad = np.arange(6, dtype=np.float32).reshape(3, 2), {4: "é\udcff"}
    parts.write(rows, features, bad)
    read, reasons = parts.read(rows)
    assert np.array_equal(read, features) and reasons == bad
    content = bytearray(parts.path(rows).read_bytes())
    content[content.index(features.tobytes()) + 2] ^= 1
    parts.path(rows).write_bytes(content)
    with pytest.raises(ValueError, match=r"000000000003.npz is damaged"):
        parts.read(rows)
