"""examples/finetune.py: the recipe reaches optimizer, schedule, augmentation and loss; runs resume, repeat and agree."""

import json
import math
import re
import signal
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from running import EXAMPLES, run_processes, run_script
from tiny_run import assert_identical, end_of, losses

from mvmae import hub
from mvmae.weights import read_weights

sys.path.append(str(EXAMPLES))
import finetune
from engine.optim import set_learning_rate
from engine.options import parse
from tasks.models import add_head, load_backbone

COLOURS = ((250, 40, 40), (40, 250, 40), (40, 40, 250))
RUN = ["--preset", "quick", "--device", "cpu", "--workers", 0, "--batch-size", 8, "--epochs", 4, "--warmup-epochs", 1]
RUN += ["--mixup", 0.8, "--cutmix", 1, "--drop-path", 0.1, "--erasing", 0.25, "--augment", "rand-m9-mstd0.5-inc1"]
RUN += ["--log-every", 1, "--eval-every", 2, "--output-dir", "run", "--data", "images", "--model", "encoder"]


def config(*arguments, preset="paper"):
    arguments = ["--preset", preset, "--data", "x", "--model", "y", "--background", "white", *map(str, arguments)]
    return parse(finetune.Config, finetune.PRESETS, "", arguments)


@pytest.fixture
def vit(tiny_vit):
    model = tiny_vit(depth=4)
    add_head(model, 5, std=2e-5)
    return model


def test_the_defaults_are_the_recipe_of_the_paper_and_of_mae():
    recipe = {"batch_size": 512, "epochs": 100, "warmup": 0.05, "base_lr": 5e-4, "layer_decay": 0.65, "weight_decay": 0.05}
    recipe |= {"drop_path": 0.1, "augment": "rand-m9-mstd0.5-inc1", "erasing": 0.25, "mixup": 0.8, "cutmix": 1.0}
    recipe |= {"smoothing": 0.1, "image_size": (), "warmup_epochs": None}
    parsed = config()
    assert {name: getattr(parsed, name) for name in recipe} == recipe


def layer_of(name, depth):
    """MAE's numbering: what is before the blocks, the blocks, what is behind them."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


@pytest.mark.parametrize("step", [0, 30, 100, 555, 999])
def test_the_rate_of_every_parameter_is_that_of_its_layer_and_step(vit, step):
    optimizer = finetune.build_optimizer(config(), vit)
    set_learning_rate(optimizer, finetune.learning_rate(config(), step + 1, 10))  # 100 epochs, 5 of them of warm-up
    peak = 5e-4 * 512 / 256
    rate = peak * step / 50
    if step >= 50:
        rate = 1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * (step - 50) / 950)) / 2
    found = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in vit.named_parameters():
        assert found.pop(id(parameter)) == pytest.approx(rate * 0.65 ** (5 - layer_of(name, 4))), name
    assert not found


def test_two_steps_follow_adamw_with_decay_on_matrices_alone(vit):
    optimizer = finetune.build_optimizer(config(), vit)
    set_learning_rate(optimizer, finetune.learning_rate(config("--warmup-epochs", 0), 1, 10))
    wanted = {name: p.detach().double() for name, p in vit.named_parameters()}
    m, v = ({name: torch.zeros_like(p) for name, p in wanted.items()} for _ in range(2))
    for step in (1, 2):
        for name, parameter in vit.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            grad, lr = parameter.grad.double(), 1e-3 * 0.65 ** (5 - layer_of(name, 4))
            decayed = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
            m[name] = 0.9 * m[name] + 0.1 * grad
            v[name] = 0.999 * v[name] + 0.001 * grad**2
            update = (m[name] / (1 - 0.9**step)) / ((v[name] / (1 - 0.999**step)).sqrt() + 1e-8)
            wanted[name] = wanted[name] * (1 - lr * (0.05 if decayed else 0)) - lr * update
        optimizer.step()
    for name, parameter in vit.named_parameters():
        assert torch.allclose(parameter.double(), wanted[name], atol=1e-6, rtol=1e-5), name


def test_images_are_mixed_and_augmented_as_in_the_recipe(vit):
    mixup = finetune.build_mixup(config(), 4)
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.switch_prob) == (0.8, 1.0, 1.0, 0.5)
    _, target = mixup(torch.zeros(2, 1, 16, 16), torch.tensor([0, 1]))
    assert target[:, 2:].flatten().tolist() == pytest.approx([0.025] * 4)  # of a smoothing of 0.1
    plain = finetune.build_mixup(config("--mixup", 0, "--cutmix", 0, "--smoothing", 0), 4)
    assert plain(torch.ones(2, 1, 4, 4), torch.tensor([2, 0]))[1].tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    mean_and_std = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    vit.pretrained_cfg |= mean_and_std
    own = ("--augment", "none", "--crop-scale", 0.3, 0.6)
    for typed, policy, scale in (((), "rand-m9-mstd0.5-inc1", (0.08, 1.0)), (own, None, (0.3, 0.6))):
        ours = finetune.build_transform(config("--image-size", 32, *typed), vit).transform
        options = {"auto_augment": policy, "scale": scale, "re_prob": 0.25, "re_mode": "pixel", "color_jitter": None}
        timms = timm.data.create_transform(32, is_training=True, interpolation="bicubic", **options, **mean_and_std)
        assert [without_address(step) for step in ours.transforms] == [without_address(step) for step in timms.transforms]


def without_address(step):
    return re.sub(r" at 0x\w+", "", f"{step} {vars(step)}")


def test_branches_are_dropped_up_to_the_rate_of_the_recipe():
    model = load_backbone("random:vit_tiny_patch16_224", drop_path_rate=config().drop_path)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.1 * number / 11 for number in range(12)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three colours in noise, and an encoder for them."""
    folder = tmp_path_factory.mktemp("finetune")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6)):
        for colour in COLOURS:
            (folder / "images" / split / f"c{colour}").mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 40, (36, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / f"c{colour}" / f"{i}.png")
    torch.manual_seed(0)
    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    hub.export(timm.create_model("mvmae_vit_tiny_patch16", **tiny), folder / "encoder")
    return folder


@pytest.fixture
def place(folder, tmp_path):
    for name in ("images", "encoder"):
        (tmp_path / name).symlink_to(folder / name)
    return tmp_path


@pytest.fixture(scope="module")
def whole(folder):
    """A run in one go."""
    done = run_script("finetune.py", *RUN, folder=folder)
    assert done.code == 0, done.err
    assert "Warning" not in done.err
    return done


def let_the_accuracy_fall():
    import tasks.labelled

    found = iter(range(90, 0, -10))
    tasks.labelled.accuracy = lambda logits, labels: {"top1": float(next(found)), "top5": 100.0, "val_loss": 1.0}


def test_the_model_of_the_best_accuracy_is_kept_where_later_ones_are_worse(place):
    done = run_script("finetune.py", *RUN, "--eval-every", 1, folder=place, patch=let_the_accuracy_fall)
    assert done.code == 0, done.err
    assert json.loads((place / "run" / "results.json").read_text())["best_top1"] == 90
    best, last = (read_weights(place / "run" / name / "model.safetensors") for name in ("best", "last"))
    assert not torch.equal(best["head.weight"], last["head.weight"])


def test_a_run_leaves_a_result_a_picture_and_models_with_the_names_of_the_classes(whole, folder):
    run = folder / "run"
    result = json.loads((run / "results.json").read_text())
    assert {"model", "data", "top1", "top5", "best_top1", "seconds"} <= result.keys()
    assert re.search(r"trained on \d+ images, tested on \d+, of 3 classes \(", whole.out)
    assert f"top-1 {result['top1']:.2f} %" in whole.out and "\r" not in whole.out
    with Image.open(run / "curves.png") as picture:
        assert min(picture.size) > 100
    ends = end_of(folder)
    last = timm.create_model(f"local-dir:{run / 'last'}", pretrained=True)
    assert all(torch.equal(value, ends["model"][key]) for key, value in last.state_dict().items())
    for name in ("best", "last"):
        names = json.loads((run / name / "config.json").read_text())["label_names"]
        assert names == sorted(f"c{colour}" for colour in COLOURS)
    # an accuracy computed by other means
    transform = timm.data.create_transform(32, interpolation="bicubic", crop_pct=0.875)
    for kind, accuracy in (("best", result["best_top1"]), ("last", result["top1"])):
        model, right = timm.create_model(f"local-dir:{run / kind}", pretrained=True).eval(), 0
        for label, name in enumerate(names):
            for path in (folder / "images" / "val" / name).iterdir():
                with Image.open(path) as image:
                    right += int(model(transform(image)[None]).argmax()) == label
        assert accuracy == pytest.approx(100 * right / 18), kind
    measured = [json.loads(line).get("top1", 0) for line in (run / "log.jsonl").read_text().splitlines()]
    assert result["best_top1"] == max(measured)


@pytest.mark.posix
def test_a_run_killed_and_resumed_ends_bit_identical(whole, folder, place):
    arguments = [*RUN, "--save-every", 5]
    cut = run_script("finetune.py", *arguments, folder=place, fault="kill@8")
    assert cut.code == -signal.SIGKILL and end_of(place)["step"] == 5
    done = run_script("finetune.py", *arguments, "--workers", 2, "--resume", folder=place)
    assert done.code == 0 and "resuming run after step 5" in done.out, done.err
    assert_identical(end_of(place), end_of(folder))
    assert end_of(place)["best"] == end_of(folder)["best"]
    assert losses(place) == losses(folder)
    again = run_script("finetune.py", *arguments, folder=place)
    assert again.code == 2 and again.err.count("\n") == 1 and "add --resume" in again.err
    other = run_script("finetune.py", *arguments, "--resume", "--layer-decay", 0.7, folder=place)
    assert other.code == 2 and "layer_decay was 0.65 and is 0.7 now" in other.err


def test_two_processes_compute_what_one_does(place):
    plain = ["--mixup", 0, "--cutmix", 0, "--drop-path", 0, "--max-steps", 6]
    assert run_script("finetune.py", *RUN, *plain, folder=place).code == 0
    alone, result = losses(place), json.loads((place / "run" / "results.json").read_text())
    both = run_processes("finetune.py", *RUN, *plain, "--output-dir", "run2", folder=place)
    assert [done.code for done in both] == [0, 0] and both[1].out == "", both
    (place / "run").rename(place / "one")
    (place / "run2").rename(place / "run")
    assert losses(place) == pytest.approx(alone, rel=1e-4)
    again = json.loads((place / "run" / "results.json").read_text())
    assert again["top1"] == pytest.approx(result["top1"]) and again["val_loss"] == pytest.approx(result["val_loss"], rel=1e-4)


def test_fine_tuning_learns_colours(place):
    simple = ["--augment", "none", "--mixup", 0, "--cutmix", 0, "--erasing", 0, "--epochs", 15]
    done = run_script("finetune.py", *RUN, *simple, folder=place)
    assert done.code == 0, done.err
    assert json.loads((place / "run" / "results.json").read_text())["top1"] > 90


@pytest.mark.parametrize("name", ["random:convnext_atto", "encoder/model.safetensors"])
def test_the_same_command_takes_any_model(place, name):
    options = ["--model", name, "--image-size", 32, "--max-steps", 1]
    done = run_script("finetune.py", *RUN, *options, folder=place)
    assert done.code == 0 and "top-1" in done.out and "Warning" not in done.err, done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", 7], "mixup needs an even number"),
        (["--data", "images/train/c(250, 40, 40)"], "must have labels, got none"),
    ],
)
def test_bad_input_ends_with_one_line_and_code_2(place, arguments, message):
    done = run_script("finetune.py", *RUN, *arguments, folder=place)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert done.err.startswith("error: ") and message in done.err and not (place / "run" / "checkpoint.pt").exists()


def test_fewer_images_than_a_batch_make_the_batch_and_its_rate(place):
    options = ["--batch-size", 512, "--train-images", 47, "--epochs", 2, "--base-lr", 4e-3]
    done = run_script("finetune.py", *RUN, *options, folder=place)
    assert done.code == 0, done.err
    assert "2 steps of 46 on cpu; --batch-size 512 is more than all 47: 46 take its place" in done.out
    last = json.loads((place / "run" / "log.jsonl").read_text().splitlines()[1])  # of 2 steps, the first of warm-up
    assert last["step"] == 2 and last["lr"] == pytest.approx(4e-3 * 46 / 256)  # mixup takes pairs
