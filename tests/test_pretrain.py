"""examples/pretrain.py and the tasks below it: length, recipe and stages of a run, what it leaves and how it resumes."""

import dataclasses
import json
import math
import os
import re
import shutil
import struct
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from running import EXAMPLES, run_processes, run_script
from tiny_run import ARGUMENTS, SMALL, assert_identical, end_of, losses, pretrain, start
from torch import nn

from mvmae.metrics import effective_rank, knn_accuracy, uniformity

sys.path.append(str(EXAMPLES))
import pretrain as script
from engine.distributed import Ranks
from engine.optim import build_optimizer
from engine.options import parse
from engine.signals import Stop
from tasks.config import Config, build_model
from tasks.pretraining import load_views, open_data, random_views, step_mask, view_loader
from tasks.schedule import Schedule, describe_schedule, fit_minutes, fit_schedule
from tasks.splits import open_splits

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU, None)


def config_of(*given):
    return parse(Config, script.PRESETS, None, [*map(str, given)])


def records(folder, run="run"):
    return [json.loads(line) for line in (folder / run / "log.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------------- length and learning rate


def length_of(number, *given, ranks=ALONE):
    return fit_schedule(config_of("--data", "x", *given), number, ranks)


@pytest.mark.parametrize(
    ("number", "views", "epochs"), [(50_000, 2, 44), (50_000, 1, 88), (12_500, 2, 88), (1562, 2, 249), (10**9, 2, 1)]
)
def test_epochs_that_are_not_given_go_with_the_inverse_root_of_the_number_of_images(number, views, epochs):
    length = length_of(number, "--preset", "small", "--batch-size", 256, "--num-views", views)
    steps = epochs * (number // 256)
    assert (length.steps, length.warmup, length.eval_every) == (steps, round(steps / 20), round(steps / 10))


@pytest.mark.parametrize(
    ("number", "batch"), [(3, 3), (256, 16), (511, 16), (512, 32), (1562, 64), (2047, 64), (12_500, 256), (10**9, 256)]
)
def test_a_batch_suits_the_number_of_images_and_the_rate_the_batch_whoever_chose_it(number, batch):
    small = ["--preset", "small", "--base-lr", 0.1, "--batch-size"]
    assert [length_of(number, *small, given)[:2] for given in (0, batch)] == [(batch, 0.1 * batch / max(batch, 16))] * 2
    assert length_of(10**9, *small, 64).lr == 0.1 * 64 / 256  # of which the recipe would take 256
    paper = ["--base-lr", 0.1, "--batch-size"]
    assert [length_of(number, *paper, given)[:2] for given in (0, batch)] == [(batch, 0.1 * batch / 256)] * 2


@pytest.mark.parametrize(
    ("number", "length", "batch"),
    [(50_000, 0.61, 32), (3000, 10, 32), (50_000, 9, 128), (3000, 150, 128), (100, 10, 16), (50_000, 44, 256)],
)
def test_a_short_run_takes_a_smaller_batch_for_some_thirty_steps_for_each_of_its_images(number, length, batch):
    by_epochs = length_of(number, "--preset", "small", "--epochs", length)
    assert (by_epochs.batch_size, by_epochs.lr) == (batch, 4e-3)
    by_steps = length_of(number, "--preset", "small", "--steps", by_epochs.steps)
    assert by_steps.batch_size == batch and by_steps.lr == 4e-3
    assert number < 50_000 or length_of(0, "--preset", "small", "--steps", by_epochs.steps).batch_size == batch  # of a stream


def test_steps_warm_up_and_stages_are_as_given_and_a_long_warm_up_is_warned_of():
    given = ["--batch-size", 8, "--base-lr", 4e-3, "--contrast-from", 0.25]  # of 32 images, 4 steps an epoch
    length = length_of(32, *given, "--epochs", 5, "--warmup-epochs", 1, "--eval-every", 2)
    assert length == Schedule(8, 4e-3 * 8 / 256, steps=20, warmup=4, frozen=0, contrast_after=5, eval_every=8, per_epoch=4)
    assert length_of(32, *given, "--steps", 7).steps == 7 and length_of(32, *given, "--eval-every", 0).eval_every == 0
    assert length_of(32, *given, "--loss-weight", 0).contrast_after == 0
    for warmup, warns in ((6, False), (7, True)):
        config = config_of("--data", "x", *given, "--steps", 100, "--warmup-epochs", warmup)
        line = describe_schedule(fit_schedule(config, 32, ALONE), config)
        assert ("warning: that is more than a quarter of 100 steps" in line) == warns
        assert line.startswith(f"100 steps of 8 images (25 epochs), peak learning rate 0.000125; warm-up of {4 * warmup} steps")
        assert "contrast from step 26" in line


@pytest.mark.parametrize("preset", script.PRESETS)
def test_with_epochs_of_ones_own_any_preset_warms_up_for_a_share_and_comes_down_to_0(preset):
    length = length_of(1000, "--preset", preset, "--epochs", 40)
    rates = [length.learning_rates(step)["lr"] / length.lr for step in range(1, length.steps + 1)]
    assert length.warmup == round({"paper": 1 / 40, "quick": 0.1, "small": 0.05}[preset] * length.steps)
    assert rates[:2] == [0, pytest.approx(1 / length.warmup)] and rates[length.warmup] == max(rates) == 1
    assert rates[length.warmup :] == sorted(rates[length.warmup :], reverse=True) and 0 <= rates[-1] < 1e-3


@pytest.mark.parametrize(("processes", "parts", "batch"), [(1, 3, 30), (2, 2, 32), (5, 3, 30)])
def test_fewer_images_than_a_batch_cut_it_and_its_rate(processes, parts, batch):
    given = ["--data", "x", "--batch-size", 256, "--accumulate", parts, "--base-lr", 4e-3]
    length = fit_schedule(config_of(*given), 32, Ranks(0, processes, CPU, None))
    assert (length.batch_size, length.lr) == (batch, pytest.approx(4e-3 * batch / 256))
    assert "cut from --batch-size 256, which is more than there are images" in describe_schedule(length, config_of(*given))


def test_minutes_are_as_many_steps_as_fit_beside_the_evaluations_by_the_slowest_rank(monkeypatch):
    """Steps of 2 s, the first ones quicker; evaluations of 3 s: 20 steps and one evaluation are spent, 11 are to come."""
    now, model = [0.0], nn.Linear(1, 1)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    optimizer = torch.optim.AdamW(model.parameters())

    def wait(seconds):
        now[0] += seconds

    def step(number, batch):
        wait(2 if number > 10 else 1)
        model(torch.ones(1)).backward()

    def fitted(minutes, *given, once=3, other=10**9):
        config = config_of("--data", "x", "--preset", "quick", "--minutes", minutes, *given)
        ranks = SimpleNamespace(device=CPU, any=bool, world_size=1, gather=lambda number: [number, other])
        schedule = fit_schedule(config, 1000, ALONE)
        timed = step, lambda schedule: range(20), lambda: wait(once)
        found = fit_minutes(config, 1000, schedule, model, optimizer, *timed, ranks)
        assert found._replace(eval_every=0) == fit_schedule(config, 1000, ALONE, found.steps)._replace(eval_every=0)
        return found.steps, found.eval_every

    before = [value.clone() for value in model.parameters()]
    steps = (600 - 30 - 3 - 11 * 3) // 2
    assert fitted(10) == (steps, round(steps / 10)) and fitted(10, other=7) == (7, 1)
    assert all(map(torch.equal, before, model.parameters())) and not optimizer.state
    assert fitted(10, once=40) == ((600 - 30 - 40 - (2 + 3) * 40) // 2, 41)  # three on the way are all that a quarter holds
    assert fitted(10, once=160) == ((600 - 30 - 160 - 2 * 160) // 2, 0)
    every = 2 * fit_schedule(config_of("--data", "x", "--preset", "quick"), 1000, ALONE).per_epoch
    assert fitted(10, "--eval-every", 2) == (int((600 - 30 - 3 - 2 * 3) / (2 + 3 / every)), every)
    with pytest.raises(Stop, match="--minutes 0.5 is too short: 2 evaluations take 20 s and a step 1 s; use --minutes 1"):
        fitted(0.5, once=10)


def test_minutes_that_hold_more_images_than_guessed_take_a_larger_batch_and_time_that(monkeypatch):
    """An image takes 1 ms: ten minutes pass not 60 000 images but 600 000, for which a batch of 128 is due."""
    now, batches, model = [0.0], [], nn.Linear(1, 1)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def step(number, batch):
        now[0] += 1e-3 * batch
        batches.append(batch)

    config = config_of("--data", "x", "--preset", "small", "--minutes", 10, "--eval-every", 0)
    ranks = SimpleNamespace(device=CPU, any=bool, world_size=1, gather=lambda number: [number])
    schedule = fit_schedule(config, 10**6, ALONE)
    timed = step, lambda schedule: [schedule.batch_size] * 20, lambda: None
    found = fit_minutes(config, 10**6, schedule, model, torch.optim.AdamW(model.parameters()), *timed, ranks)
    assert batches == [32] * 20 + [128] * 20
    assert (found.batch_size, found.lr, found.steps) == (128, 4e-3, int((600 - 20 * 0.032 - 20 * 0.128) / 0.128))


def test_a_run_of_minutes_is_one_of_its_steps_to_the_bit_and_goes_on_with_their_number(images, tmp_path):
    given = ["--epochs", 0, "--warmup-epochs", 1, *LATE, "--save-every", 10**6, "--log-every", 30, "--contrast-from", 0.5]
    printed = [
        pretrain(tmp_path / name, images, *given, *length)
        for name, *length in (
            ("minutes", "--minutes", 0.03, "--max-steps", 2),
            ("minutes", "--minutes", 0.03, "--resume"),
        )
    ]
    assert [result.code for result in printed] == [0, 0], printed
    told = [re.search(r"(\d+) steps of 8 images .*; as many as fit into 0.03 minutes", result.out) for result in printed]
    assert told[0] and told[1] and told[0][1] == told[1][1] and int(told[0][1]) > 2
    assert f"stopped at step 2 of {told[0][1]}; " in printed[0].out and "not finished" not in printed[1].out
    assert pretrain(tmp_path / "steps", images, *given, "--steps", told[0][1]).code == 0
    assert_identical(end_of(tmp_path / "minutes"), end_of(tmp_path / "steps"))
    late = [line for line in records(tmp_path / "steps") if "loss" in line]
    half = round(int(told[0][1]) / 2)  # no line is a mean of steps with and without the contrastive loss
    assert half in [line["step"] for line in late] and all((line["loss_con"] > 0.5) == (line["step"] > half) for line in late)


@pytest.mark.parametrize("start", [0, 1, 3])
def test_jitter_waits_for_the_contrastive_loss(images, start):
    config = config_of("--data", images, "--preset", "small", "--contrast-from", 0.5, "--workers", 0)
    encoder, pictures = timm.create_model("mvmae_vit_micro_patch8_64"), open_data(config)
    schedule = fit_schedule(config, pictures.length, ALONE)._replace(batch_size=8, contrast_after=2)
    plain = dataclasses.replace(config, jitter=(), grayscale=0.0)
    expected = [
        batch.views
        for stage, first, last in ((plain, 0, 2), (config, 2, 4))
        for batch in view_loader(stage, encoder, pictures, schedule, first, last, ALONE)
    ]
    found = [batch.views for batch in load_views(config, encoder, pictures, schedule, start, 4, ALONE)]
    assert len(expected) == 4 and len(found) == 4 - start and all(map(torch.equal, found, expected[start:]))
    always = [batch.views for batch in view_loader(config, encoder, pictures, schedule, 0, 4, ALONE)]
    assert [torch.equal(*both) for both in zip(always, expected, strict=True)] == [False, False, True, True]


# ---------------------------------------------------------------------------------------------------------- model and step


TINY = ["--data", "x", "--preset", "quick", "--encoder-args", SMALL, "--image-size", 32, "--decoder-depth", 1]


@pytest.mark.parametrize("preset", ["quick", "small"])
@pytest.mark.parametrize(
    ("width", "given", "decoder", "heads"), [(384, 0, 192, 6), (192, None, 96, 3), (48, 0, 32, 1), (192, 64, 64, 2)]
)
def test_a_decoder_whose_size_is_not_given_suits_the_encoder_that_is(preset, width, given, decoder, heads):
    typed = ["--encoder-args", f"embed_dim={width} depth=1 num_heads=3 patch_size=8", "--decoder-heads", 0]
    typed += [] if given is None else ["--decoder-dim", given]
    built = build_model(config_of("--data", "x", "--preset", preset, *typed), CPU).decoder
    assert (built.embed.out_features, built.blocks[0].attn.num_heads) == (decoder, heads)


def losses_of(*given):
    """Losses of the same 8 bright images of noise in two views, at the weights that a run starts from."""
    config = config_of(*TINY, *given)
    model = build_model(config, CPU).train()
    views = 2.4 + torch.randn(8, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) / 2
    return model(views, mask=step_mask(config, model.encoder, 8, 1, ALONE))


def test_options_of_the_losses_reach_them():
    assert 0 < losses_of("--norm-pix").loss_rec < 2 < 4 < losses_of("--no-norm-pix").loss_rec  # 1 and 2.4^2
    alike = losses_of("--temperature", 1e6)  # 15 of the 16 views are candidates, each as likely as the others
    assert alike.loss_con.item() == pytest.approx(math.log(15), rel=1e-5)
    assert abs(losses_of().loss_con - math.log(15)) > 1e-3
    assert losses_of("--loss-weight", 0).loss_con == 0 and losses_of("--projector", 4).projected.shape == (8, 2, 4)
    assert losses_of("--mask-ratio", 0.5).mask.visible.shape == (16, 8)
    layers = build_model(config_of(*TINY, "--projector", 4), CPU).projector
    widths = [tuple(layer.weight.shape) for layer in layers if isinstance(layer, nn.Linear)]
    assert widths == [(16, 32), (16, 16), (4, 16)] and any("Norm" in type(layer).__name__ for layer in layers)


def test_the_scale_of_crops_reaches_the_views():
    config = config_of(*TINY, "--crop-scale", 0.3, 0.6)
    assert random_views(config, build_model(config, CPU).encoder, 2).scale == (0.3, 0.6)


def test_every_step_has_masks_of_its_own_and_processes_share_them():
    config = config_of(*TINY)
    encoder = build_model(config, CPU).encoder
    first, again, other = (step_mask(config, encoder, 8, step, ALONE).masked for step in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other) and len(first.unique(dim=0)) > 8
    halves = [step_mask(config, encoder, 8, 1, Ranks(rank, 2, CPU, None)).masked for rank in range(2)]
    assert torch.equal(torch.cat(halves), first)


@pytest.mark.parametrize(
    ("name", "precision", "error"),
    [("adamw", "auto", 1e-6), ("muon", "auto", 1e-5), ("muon", "float32", 1e-5), ("muon", "bf16", 0.05)],
)
def test_the_optimizer_is_adamw_with_the_papers_betas_or_muon_in_the_precision_of_the_run(name, precision, error):
    """Muon against Newton and Schulz's iteration in float64, x <- a x + (b x x' + c (x x')^2) x, with timm's coefficients."""
    gradients = [[torch.randn(12, 20), torch.randn(7)] for _ in range(2)]
    found, plain = ([nn.Parameter(torch.ones(12, 20)), nn.Parameter(torch.ones(7))] for _ in range(2))
    groups = [
        [{"params": [one], "weight_decay": decay} for one, decay in zip(pair, (0.5, 0), strict=True)] for pair in (found, plain)
    ]
    ours = build_optimizer(groups[0], name, lr=0.1, precision=precision, device=CPU)
    adamw = torch.optim.AdamW(groups[1], lr=0.1, betas=(0.9, 0.95))
    for step in gradients[: 2 if name == "adamw" else 1]:
        for parameter, gradient in zip([*found, *plain], step * 2, strict=True):
            parameter.grad = gradient.clone()
        ours.step(), adamw.step()
    torch.testing.assert_close(found[1], plain[1])  # vectors are AdamW's
    expected = plain[0].detach()
    if name == "muon":
        x = gradients[0][0].double() / gradients[0][0].double().norm()
        for a, b, c in timm.optim.muon.resolve_ns_coefficients("quintic", timm.optim.muon._COEFFICIENTS):
            product = x @ x.T
            x = a * x + (b * product + c * product @ product) @ x
        expected = 1 - 0.1 * 0.5 - 0.1 * 0.2 * 20**0.5 * x
    changes = [1 - value.detach().double() - 0.05 for value in (found[0], expected)]
    distance = (changes[0] - changes[1]).norm() / changes[1].norm()
    assert distance < error and (precision != "bf16" or distance > 1e-4)


# ------------------------------------------------------------------------------------------------------ a run and its recipe


def test_a_run_leaves_what_the_readme_promises(whole):
    printed = (whole / "printed.txt").read_text()
    expected = {"config.json", "log.jsonl", "checkpoint.pt", "curves.png", "reconstructions.png", "encoder", "summary.md"}
    assert expected <= {path.name for path in (whole / "run").iterdir()}
    config, page = json.loads((whole / "run" / "config.json").read_text()), (whole / "run" / "summary.md").read_text()
    assert config["batch_size"] == 8 and config["chosen"].keys() >= {"model", "decoder", "start", "images", "training"}
    for name, text in config["chosen"].items():  # printed, saved, and on the page
        assert re.search(f"^{name} +{re.escape(text)}$", printed, re.MULTILINE) and f"- {name}: {text}\n" in page
    assert "20 steps of 8 images (5 epochs)" in config["chosen"]["training"] and config["chosen"]["start"] == "random"
    ended = "stopped at step 12 of 20; the schedule was not finished: this encoder is for trying out"
    assert ended in printed and f"- {ended}\n" in page
    assert json.loads((whole / "run" / "encoder" / "config.json").read_text())["training"].endswith(f"; {ended}")
    assert list(losses(whole)) == list(range(1, 13))
    for picture in ("curves.png", "reconstructions.png"):
        with Image.open(whole / "run" / picture) as image:
            assert min(image.size) > 100
    assert "timm.create_model(" in printed and "step 12/12 " in printed and "\r" not in printed
    assert "pretrain.py --data" in page.rstrip().splitlines()[-1]


def test_the_exported_encoder_is_the_trained_one(whole, monkeypatch):
    monkeypatch.chdir(whole)
    encoder = timm.create_model("local-dir:run/encoder", pretrained=True)
    trained = {name[8:]: value for name, value in end_of(whole)["model"].items() if name.startswith("encoder.")}
    assert trained.keys() == encoder.state_dict().keys()
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in trained.items())


def test_training_changes_every_trained_weight_and_not_the_positions(whole):
    first = build_model(config_of("--data", "x", *ARGUMENTS), CPU).state_dict()
    last = end_of(whole)["model"]
    assert first.keys() == last.keys()
    assert [name for name in first if torch.equal(first[name], last[name])] == ["encoder.pos_embed"]


def test_the_rate_rises_for_an_epoch_and_falls_as_a_cosine_from_that_of_the_batch(whole):
    peak, warmup, steps = 4e-3 * 8 / 256, 4, 20  # 32 images in batches of 8: 4 steps an epoch, 5 epochs
    expected = [
        peak * step / warmup if step < warmup else peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        for step in range(12)
    ]
    assert [record["lr"] for record in records(whole) if "loss" in record] == pytest.approx(expected, rel=1e-6)


def test_the_small_recipe_trains_on_few_images_and_resumes_bit_identical(images, tmp_path):
    given = ["--preset", "small", "--data", images, "--output-dir", "run", "--batch-size", 8, "--workers", 0]
    given += ["--device", "cpu", "--log-every", 1, "--eval-images", 0, "--encoder-args", SMALL]
    for name, steps in (("whole", (3,)), ("cut", (2, 3))):
        for last in steps:
            result = run_script("pretrain.py", *given, "--max-steps", last, "--resume", folder=tmp_path / name)
            assert result.code == 0, result.err
    assert_identical(end_of(tmp_path / "cut"), end_of(tmp_path / "whole"))
    found = records(tmp_path / "cut")
    assert [line["step"] for line in found] == [1, 2, 3] and all(line["loss_con"] == 0 for line in found)  # of 6956
    assert (
        "of 8 images (1739 epochs), peak learning rate 0.002; warm-up of 348 steps; contrast and jitter from step 3479"
        in result.out
    )
    assert "muon with betas 0.9 0.95 and weight decay 0.05 on cpu" in result.out  # 44 x sqrt(50 000 / 32)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Two classes of 30 images of noise, one reddish, one bluish, without a validation split."""
    folder, rng = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for channel, name in ((0, "red"), (2, "blue")):
        (folder / name).mkdir()
        for i in range(30):
            pixels = rng.integers(0, 156, (36, 40, 3), dtype=np.uint8)
            pixels[..., channel] += 99
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")
    return folder


def test_evaluations_are_those_of_plain_timm_on_the_same_files(classes, tmp_path):
    """Features by the exported encoder and timm's own transform; 54 images are 6 steps of 8."""
    given = ["--workers", 0, "--max-steps", 10, "--eval-images", 99, "--eval-every", 0.5]
    result = pretrain(tmp_path, classes, *given)
    assert result.code == 0, result.err
    found = [line for line in records(tmp_path) if "knn" in line]
    assert [line["step"] for line in found] == [0, 3, 6, 10]  # not 9, shortly before the end
    encoder = timm.create_model(f"local-dir:{tmp_path}/run/encoder", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))
    features, labels = [], []
    for part in open_splits(str(classes))[:2]:
        files = [part.name(i) for i in range(len(part))]
        with torch.inference_mode():
            tokens = encoder.forward_features(torch.stack([transform(Image.open(file).convert("RGB")) for file in files]))
        features.append(tokens[:, encoder.num_prefix_tokens :].mean(dim=1))
        labels.append(torch.tensor([int("red" in file) for file in files]))
    bank, queries = features
    assert (len(bank), len(queries)) == (54, 6)
    assert found[-1]["knn"] == pytest.approx(100 * knn_accuracy(bank, labels[0], queries, labels[1], k=20), abs=1e-4)
    both = torch.cat([queries, bank])  # few held-out images span few directions
    assert found[-1]["effective_rank"] == pytest.approx(effective_rank(both), rel=1e-4)
    assert found[-1]["uniformity"] == pytest.approx(uniformity(both), rel=1e-4)
    said = f"k-NN accuracy on held-out images: {found[0]['knn']:.1f} % before, {found[-1]['knn']:.1f} % after"
    assert said in result.out and "on 6 held-out images, k-NN" in result.out


# ------------------------------------------------------------------------------------------------------------------- stages


LATE = ["--contrast-from", 0.25, "--projector", 8, "--save-every", 5, "--workers", 0]
"""The contrastive loss from step 6 of 20 on."""


@pytest.fixture(scope="module")
def late(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("late")
    result = pretrain(folder, images, *LATE, "--max-steps", 8)
    assert result.code == 0, result.err
    return folder


def test_the_contrastive_loss_may_begin_late(late, images, tmp_path):
    """Until then the weights are those of a run without it, and the projector is as it was."""
    found = [line["loss_con"] for line in records(late) if "loss" in line]
    assert found[:5] == [0] * 5 and min(found[5:]) > 0 and len(found) == 8
    given = ["--projector", 8, "--loss-weight", 0, "--workers", 0]
    assert pretrain(tmp_path, images, *given, "--max-steps", 5).code == 0
    first = build_model(config_of("--data", "x", *ARGUMENTS, *LATE), CPU).state_dict()
    cut = torch.load(late / "run" / "checkpoint-previous.pt", weights_only=True)
    alone, end = end_of(tmp_path)["model"], end_of(late)["model"]
    assert cut["step"] == 5 and alone.keys() == cut["model"].keys()
    assert all(torch.equal(value, alone[name]) for name, value in cut["model"].items())
    head = [name for name in end if name.startswith("projector.")]
    assert len(head) > 2 and all(torch.equal(alone[name], first[name]) for name in head)
    assert all(not torch.equal(end[name], first[name]) for name in head)


@pytest.mark.parametrize("cut", [3, 5])
def test_a_run_cut_before_the_contrastive_loss_begins_ends_bit_identical(late, images, tmp_path, cut):
    for last in (cut, 8):
        assert pretrain(tmp_path, images, *LATE, "--max-steps", last, "--resume").code == 0
    assert_identical(end_of(tmp_path), end_of(late))


@pytest.mark.parametrize("way", ["processes", "parts"])
def test_two_processes_and_batches_in_parts_begin_it_alike(late, images, tmp_path, way):
    """Up to step 6 within 1e-5; then a small change of the weights is a larger one behind the normalised projector."""
    if way == "processes":
        given = [*ARGUMENTS, "--data", images, "--output-dir", "run", *LATE, "--max-steps", 8]
        results = run_processes("pretrain.py", *given, folder=tmp_path)
    else:
        results = [pretrain(tmp_path, images, *LATE, "--max-steps", 8, "--accumulate", 2)]
    assert [result.code for result in results] == [0] * len(results), results
    assert results[-1].out == "" or way == "parts"  # one of them speaks
    here, there = (list(losses(folder).values()) for folder in (tmp_path, late))
    assert here[:6] == pytest.approx(there[:6], rel=1e-5) and here == pytest.approx(there, rel=1e-4)
    moments = [torch.load(folder / "run" / "checkpoint-previous.pt", weights_only=True) for folder in (tmp_path, late)]
    assert moments[0]["optimizer"]["state"].keys() == moments[1]["optimizer"]["state"].keys()  # none of the projector
    for name, value in moments[0]["model"].items():
        if name.startswith("projector."):
            assert torch.equal(value, moments[1]["model"][name])
    assert (tmp_path / "run" / "reconstructions.png").exists()  # which one of them draws alone


# ------------------------------------------------------------------------------------------- processes, parts, cuts, images


@pytest.mark.posix
def test_on_a_terminal_a_bar_shows(images, tmp_path):
    import fcntl
    import pty
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    seen = bytearray()

    def read():
        try:
            while data := os.read(leader, 4096):
                seen.extend(data)
        except OSError:
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    started = start(tmp_path, images, "--max-steps", 3, "--workers", 0, fault="slow", terminal=os.ttyname(follower))
    assert started.finish().code == 0
    os.close(follower)  # nobody writes any more: the reader comes to the end
    reader.join()
    for words in (b"3/3 steps", b"images/s, ", b"% waiting for data, ", b" left", b"\r"):
        assert words in seen, words


def test_bad_images_are_replaced_and_listed(images, tmp_path):
    shutil.copytree(images, tmp_path / "odd")
    good = (images / "0.jpg").read_bytes()
    for name, content in {"empty.jpg": b"", "cut.jpg": good[: len(good) // 2], "text.jpg": b"<html>"}.items():
        (tmp_path / "odd" / name).write_bytes(content)
    Image.new("L", (300, 300)).save(tmp_path / "odd" / "large.png")
    (tmp_path / "odd" / "folder.jpg").mkdir()
    (tmp_path / "odd" / "loop").symlink_to(tmp_path / "odd")
    given = ["--workers", 1, "--batch-size", 9, "--max-pixels", 80_000]
    result = pretrain(tmp_path, tmp_path / "odd", *given, "--eval-images", 99)
    assert result.code == 0 and len(losses(tmp_path)) == 20, result.err
    listed = (tmp_path / "run" / "bad_files.txt").read_text().splitlines()
    bad = ["cut.jpg", "empty.jpg", "large.png", "text.jpg"]
    assert sorted(line.split("\t")[0].rpartition("/")[2] for line in listed) == bad
    assert "300" in next(line for line in listed if "large.png" in line)
    refused = pretrain(tmp_path, tmp_path / "odd", *given, "--max-bad", 2, "--output-dir", "other")
    assert refused.code == 1 and "3 bad images, more than the 2 allowed" in refused.err


def test_pictures_are_of_training_images_where_no_held_out_one_can_be_read(images, tmp_path):
    shutil.copytree(images, tmp_path / "data" / "train" / "a")
    (tmp_path / "data" / "val" / "a").mkdir(parents=True)
    (tmp_path / "data" / "val" / "a" / "0.jpg").write_bytes(b"<html>")
    result = pretrain(tmp_path, "data", "--max-steps", 1, "--workers", 0)
    assert result.code == 0 and (tmp_path / "run" / "reconstructions.png").exists(), result.err


@pytest.mark.parametrize(
    ("channels", "jitter", "left"), [(4, ["0.4", "0.3", "0.2", "0.1"], "brightness 0.4, contrast 0.3"), (1, ["0", "0"], "")]
)
def test_channels_need_their_statistics_and_without_colours_have_no_jitter_of_colour(tmp_path, channels, jitter, left):
    rng = np.random.default_rng(0)
    (tmp_path / "arrays").mkdir()
    for i in range(16):
        np.save(tmp_path / "arrays" / f"{i}.npy", rng.integers(0, 255, (40, 48, channels), dtype=np.uint8))
    arguments = ["--in-chans", channels, "--max-steps", 2, "--workers", 0, "--eval-images", 8]
    arguments += ["--jitter", *jitter, "--grayscale", 0.2]
    if channels == 4:  # of one channel they are the means over three
        refused = pretrain(tmp_path, "arrays", *arguments)
        assert refused.code == 2 and "mean and std must have one number for each of 4 channels" in refused.err, refused.err
    result = pretrain(tmp_path, "arrays", *arguments, "--mean", *[0.5] * channels, "--std", *[0.25] * channels)
    assert result.code == 0 and "view retrieval: " in result.out, result.err
    views = f"; jitter of {left}; no jitter of colour, which {channels} channels do not have" if left else ""
    assert f"views       2, crops of 0.2 to 1 of the area{views}\n" in result.out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    exported = json.loads((tmp_path / "run" / "encoder" / "config.json").read_text())
    assert config["inputs"] == exported["inputs"] and config["inputs"]["mean"] == [0.5] * channels
    assert exported["pretrained_cfg"]["input_size"] == [channels, 32, 32]


# ------------------------------------------------------------------------------------------------------ what is one line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "no/such/folder"], ["no/such/folder"]),
        (["--data", "."], ["holds no images", "empty"]),
        (["--image-size", 30], ["30x30", "multiple of the patch size 8", "32x32"]),
        (["--batch-size", 1], ["--batch-size 1", "--loss-weight 0"]),
        (["--device", "cuda"], ["--device cuda", "--device cpu"]),
        (["--encoder", "swin_tiny_patch4_window7_224", "--encoder-args", ""], ["SwinTransformer", "plain ViT"]),
        (["--encoder", "vit_bse_patch16_224"], ["vit_bse_patch16_224", "vit_base_patch16_224"]),
        (["--encoder-args", "embed_dims=3"], ["embed_dims"]),
        (["--encoder-args", "depth=0"], ["depth must be at least 1"]),
        (["--encoder-args", "depth=-1"], ["depth=-1"]),
        (["--decoder-dim", 10**9], ["--decoder-dim", "at most 8192"]),
        (["--projector", 10**9], ["--projector", "at most 8192"]),
        (["--num-views", 10**5], ["--num-views", "at most 64"]),
        (["--max-steps", 10**400], ["--max-steps", "below 2147483648"]),
    ],
)
def test_bad_input_is_one_line(images, tmp_path, monkeypatch, arguments, words):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((Stop, ValueError, TypeError)) as caught:
        script.main(config_of("--data", images, "--output-dir", "run", *ARGUMENTS, *arguments))
    line = str(caught.value)
    assert getattr(caught.value, "code", 2) == 2 and "\n" not in line
    assert [word for word in words if word not in line] == [] and not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_run_goes_on_with_other_epochs_and_says_so(whole, images, tmp_path):
    shutil.copytree(whole / "run", tmp_path / "run")
    result = pretrain(tmp_path, images, "--resume", "--epochs", 3.5, "--max-steps", 0, "--workers", 1)
    assert result.code == 0, result.err
    assert "epochs was 5.0 and is 3.5 now" in result.out and "workers was 0 and is 1 now" in result.out
    assert list(losses(tmp_path)) == list(range(1, 15)) and "the schedule was not finished" not in result.out
