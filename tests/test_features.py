"""examples/tasks/evaluation.py: features of images that are not trained on, shared by processes, the same every time."""

import sys

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from PIL import Image
from running import EXAMPLES
from tiny_run import end_of, pretrain

from mvmae import MultiViewTransform

sys.path.append(str(EXAMPLES))
from engine.distributed import Ranks
from engine.signals import Stop
from tasks.evaluation import Evaluation
from tasks.splits import open_splits

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU, None)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Two classes of 30 images of noise, one reddish, one bluish, without a validation split."""
    folder = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    for channel, name in ((0, "red"), (2, "blue")):
        (folder / name).mkdir()
        for i in range(30):
            pixels = rng.integers(0, 156, (36, 40, 3), dtype=np.uint8)
            pixels[..., channel] += 99
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")
    return folder


def some(folder, classes, count):
    """So many images of each class, in a folder of their own."""
    for name in ("red", "blue"):
        (folder / name).mkdir()
        for i in range(count):
            (folder / name / f"{i}.png").symlink_to(classes / name / f"{i:02}.png")
    return folder


def evaluate(folder, ranks=ALONE, workers=0, limit=50, max_bad=3):
    """What two evaluations of the same encoder measure."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 0}
    vit = timm.create_model("vit_tiny_patch16_224", **sizes, drop_path_rate=0.5).train()
    vit.pretrained_cfg = {**vit.pretrained_cfg, "input_size": (3, 32, 32)}
    options = {"limit": limit, "ranks": ranks, "workers": workers, "max_bad": max_bad}
    evaluation = Evaluation(vit, open_splits(str(folder)), MultiViewTransform(32, num_views=3), **options)
    before = torch.get_rng_state()
    found = [evaluation(), evaluation()]
    assert torch.equal(torch.get_rng_state(), before) and vit.training and found[0] == found[1]
    return found[0], evaluation.describe()


def evaluate_with_another(folder):
    return evaluate(folder, Ranks(dist.get_rank(), 2, CPU, dist.new_group(backend="gloo")))


@pytest.mark.parametrize("kind", ["many", "few", "unlabelled"])
def test_an_evaluation_repeats_and_two_processes_and_workers_measure_what_one_does(classes, tmp_path, two_processes, kind):
    """Of few images one is held out, and one process has none of it."""
    folder = classes / "red" if kind == "unlabelled" else some(tmp_path, classes, 30 if kind == "many" else 5)
    alone, said = evaluate(folder)
    assert alone.keys() == {"effective_rank", "uniformity", "retrieval" if kind == "unlabelled" else "knn"}
    number = {"many": "6 held-out", "few": "1 held-out", "unlabelled": "30 training"}[kind]
    assert said == f"on {number} images, {'view retrieval' if kind == 'unlabelled' else 'k-NN'}"
    for found, _ in two_processes(evaluate_with_another, str(folder)):
        assert found == pytest.approx(alone, rel=1e-4)
    if kind != "few":
        assert evaluate(folder, workers=2)[0] == alone


def test_the_neighbours_are_images_that_are_trained_on(tmp_path):
    """Of noise with labels drawn at random, which no features tell: a held-out image must not be its own neighbour."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(40):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / name / f"{i:02}.png")
    splits = open_splits(str(tmp_path))
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3).eval()
    vit.reset_classifier(0, "avg")
    vit.pretrained_cfg = {**vit.pretrained_cfg, "input_size": (3, 32, 32), "crop_pct": 1.0}
    mean, std = (torch.tensor(vit.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))

    def by_hand(part):
        pixels = [np.array(Image.open(part.name(i)), np.float32) for i in range(len(part))]
        with torch.no_grad():
            found = vit(torch.stack([(torch.from_numpy(x).permute(2, 0, 1) / 255 - mean) / std for x in pixels]))
        return torch.nn.functional.normalize(found, dim=1), torch.as_tensor(part.labels)

    (bank, known), (queries, labels) = by_hand(splits.train), by_hand(splits.val)
    similarity, nearest = (queries @ bank.T).topk(20)
    votes = torch.zeros(len(queries), 2).scatter_add_(1, known[nearest], (similarity / 0.07).exp())
    expected = 100 * float((votes.argmax(1) == labels).float().mean())
    options = {"limit": 100, "ranks": ALONE, "workers": 0, "max_bad": 0}
    assert Evaluation(vit, splits, MultiViewTransform(32), **options)()["knn"] == pytest.approx(expected) and expected < 90


def test_few_images_held_out_are_no_collapse(tmp_path, classes):
    found, _ = evaluate(some(tmp_path, classes, 7))
    assert found["knn"] == 100 and found["effective_rank"] > 2  # 2 held out, 12 neighbours


def test_a_run_on_classes_without_a_validation_split_never_opens_what_it_holds_out(classes, tmp_path):
    held = [open_splits(str(classes)).val.name(i) for i in range(5)]  # one of the 6 is left for the picture at the end
    (tmp_path / "some").mkdir()
    for path in classes.rglob("*.png"):
        place = tmp_path / "some" / path.relative_to(classes)
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(b"held out" if str(path) in held else path.read_bytes())
    result = pretrain(tmp_path, "some", "--workers", 0, "--max-bad", 0, "--crop-scale", 0.9, 1)
    assert result.code == 0, result.err
    assert "one image of ten of each class is held out" in result.out and "  54 images\n" in result.out
    assert end_of(tmp_path)["step"] == 5 * (54 // 8) and not (tmp_path / "run" / "bad_files.txt").exists()
    with pytest.raises(Stop, match="more than the 2 that --max-bad allows"):
        evaluate(tmp_path / "some", max_bad=2)
