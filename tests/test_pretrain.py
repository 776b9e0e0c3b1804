import dataclasses
import json
import math
import os
import shutil
import signal
import struct
import sys
import threading
import zlib

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from running import EXAMPLES, run_processes, run_script
from tiny_run import ARGUMENTS, SMALL, assert_identical, end_of, losses, pretrain, start, wait_for_steps

from mvmae import CentreCropTransform
from mvmae.data import open_images

sys.path.append(str(EXAMPLES))
from engine.cli import parse

from engine.optim import build_optimizer
from pretrain import PRESETS
from tasks.drawn_images import varied
from tasks.method import Config, build_model
from tasks.outcome import computed, look_due
from tasks.pretraining import fit_batch, fit_length


def test_a_run_leaves_what_the_readme_promises(whole):
    printed = (whole / "printed.txt").read_bytes()
    expected = {"config.json", "log.jsonl", "checkpoint.pt", "curves.png", "reconstructions.png", "encoder"}
    assert expected <= {path.name for path in (whole / "run").iterdir()}
    assert json.loads((whole / "run" / "config.json").read_text())["batch_size"] == 8
    assert list(losses(whole)) == list(range(1, 13))
    for picture in ("curves.png", "reconstructions.png"):
        with Image.open(whole / "run" / picture) as image:
            assert min(image.size) > 100
    assert b"timm.create_model(" in printed and b"step 12/12 " in printed and b"\r" not in printed


def test_the_reconstructions_are_of_held_out_images_that_an_eye_can_judge():
    data, centre = open_images("sample", split="val"), CentreCropTransform(48)
    images = varied(data, centre)
    assert torch.equal(images, varied(data, centre)) and images.shape == (8, 3, 48, 48)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:256].tolist()
    best = {}  # of each class, the one with the largest contrast among those that are read
    for image, label in (data[index] for index in order):
        view = centre(image)
        contrast = sum(channel.float().std() for channel in view)
        best[label] = max(best.get(label, (0, None)), (contrast, view), key=lambda pair: pair[0])
    shown = [next(label for label, (_, view) in best.items() if torch.equal(view, image)) for image in images]
    assert len(set(shown)) == 8  # classes
    grey = {label for label, (_, view) in best.items() if (view.amax(0) == view.amin(0)).all()}
    assert len(grey) == 6 and not grey & set(shown)  # brick, camera, coins, grass, gravel, moon


def test_the_exported_encoder_is_the_trained_one(whole, monkeypatch):
    monkeypatch.chdir(whole)
    encoder = timm.create_model("local-dir:run/encoder", pretrained=True)
    trained = {name[8:]: value for name, value in end_of(whole)["model"].items() if name.startswith("encoder.")}
    assert trained.keys() == encoder.state_dict().keys()
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in trained.items())


def test_training_changes_every_trained_weight_and_not_the_positions(whole, images, tmp_path):
    pretrain(tmp_path, images, "--max-steps", 1, "--workers", 0)
    first, last = end_of(tmp_path)["model"], end_of(whole)["model"]
    assert [name for name in first if torch.equal(first[name], last[name])] == ["encoder.pos_embed"]


# ------------------------------------------------------------------------------------------------------------- the recipe


def records(folder):
    return [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("number", "views", "epochs"), [(50_000, 2, 44), (50_000, 1, 88), (12_500, 2, 88), (1562, 2, 249), (10**9, 2, 1)]
)
def test_a_length_that_is_not_given_suits_the_number_of_images(number, views, epochs):
    """The views that are seen go with the root of the number, whatever the number of views of an image."""
    config = parse(Config, PRESETS, None, ["--data", "x", "--epochs", "0", "--num-views", str(views)])
    fitted = fit_length(config, number)
    assert (fitted.epochs, fitted.warmup_epochs, fitted.monitor_every) == (epochs, epochs / 20, max(round(epochs / 10), 1))
    given = dataclasses.replace(config, epochs=3.0)
    assert fit_length(given, number) is given
    assert fit_length(dataclasses.replace(config, monitor_every=0), number).monitor_every == 0


def test_no_look_is_due_shortly_before_the_one_at_the_end():
    config = parse(Config, PRESETS, None, ["--data", "x", "--monitor-every", "30"])
    due = [step for step in range(1, 4833) if look_due(config, step, 16, 4832)]  # 302 epochs of 16 steps
    assert due == list(range(480, 4800, 480))
    assert [step for step in range(1, 722) if look_due(config, step, 16, 721)] == [480]
    assert [step for step in range(1, 961) if look_due(config, step, 16, 960)] == [480]  # 960 has one in any case
    never = dataclasses.replace(config, monitor_every=0)
    assert not any(look_due(never, step, 16, 4832) for step in range(1, 4833))


@pytest.mark.parametrize(
    ("number", "batch"), [(3, 16), (256, 16), (511, 16), (512, 32), (1562, 64), (4095, 128), (4096, 256), (10**9, 256)]
)
def test_a_batch_that_is_not_given_suits_the_number_of_images(number, batch):
    config = parse(Config, PRESETS, None, ["--data", "x", "--batch-size", "0", "--base-lr", "1"])
    assert fit_batch(config, number) == dataclasses.replace(config, batch_size=batch, base_lr=256 / batch)
    given = dataclasses.replace(config, batch_size=7)
    assert fit_batch(given, number) is given


@pytest.mark.parametrize(
    ("width", "given", "decoder", "heads"), [(384, 0, 192, 6), (192, 0, 96, 3), (48, 0, 32, 1), (192, 64, 64, 2)]
)
def test_a_decoder_whose_size_is_not_given_has_half_the_width_of_the_encoder(width, given, decoder, heads):
    encoder = ["--encoder-args", f"embed_dim={width} depth=1 num_heads=3 patch_size=8"]
    typed = ["--data", "x", "--preset", "quick", *encoder, "--decoder-dim", str(given), "--decoder-heads", "0"]
    built = build_model(parse(Config, PRESETS, None, typed)).decoder
    assert (built.embed.out_features, built.blocks[0].attn.num_heads) == (decoder, heads)


def test_the_rate_rises_for_an_epoch_and_falls_as_a_cosine_from_that_of_the_batch(whole):
    peak, warmup, steps = 4e-3 * 8 / 256, 4, 20  # 32 images in batches of 8: 4 steps an epoch, 5 epochs
    expected = [
        peak * step / warmup if step < warmup else peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        for step in range(12)
    ]
    assert [record["lr"] for record in records(whole) if "loss" in record] == pytest.approx(expected, rel=1e-6)


def test_the_optimizer_is_adamw_with_the_papers_betas_and_decays_what_has_two_dimensions(images, tmp_path):
    """With so much decay that it shows in one step, the second: the first has a rate of 0."""
    ends = []
    for decay in (0, 1000):
        result = pretrain(tmp_path / str(decay), images, "--max-steps", 2, "--save-every", 1, "--weight-decay", decay)
        assert result.code == 0, result.err
        ends.append(end_of(tmp_path / str(decay)))
    first = torch.load(tmp_path / "1000" / "run" / "checkpoint-previous.pt", weights_only=True)
    start, rate = first["model"], 4e-3 * 8 / 256 / 4
    for name, weight in start.items():
        lost = ends[0]["model"][name] - ends[1]["model"][name]
        decayed = weight.ndim > 1 and name != "encoder.pos_embed"
        torch.testing.assert_close(lost, weight * rate * 1000 if decayed else torch.zeros_like(weight), rtol=1e-3, atol=1e-6)
    saved = first["optimizer"]
    for group in saved["param_groups"]:  # biases are 0 at the start, so that their decay does not show in weights
        assert {(saved["state"][i]["exp_avg"].ndim > 1) for i in group["params"]} == {group["weight_decay"] > 0}
    mean, square = (torch.cat([entry[key].flatten() for entry in saved["state"].values()]) for key in ("exp_avg", "exp_avg_sq"))
    assert mean.count_nonzero() > 1000
    torch.testing.assert_close(square, (1 - 0.95) / (1 - 0.9) ** 2 * mean**2, rtol=1e-3, atol=1e-12)


def update(folder, images, *arguments):
    """What the second step changes in each weight; the first has a rate of 0."""
    result = pretrain(folder, images, "--max-steps", 2, "--save-every", 1, "--weight-decay", 0, *arguments)
    assert result.code == 0, result.err
    start = torch.load(folder / "run" / "checkpoint-previous.pt", weights_only=True)["model"]
    return {name: weight - start[name] for name, weight in end_of(folder)["model"].items()}


def test_muon_makes_the_update_of_a_matrix_orthogonal_and_leaves_vectors_to_adamw(images, tmp_path):
    adamw, muon = (update(tmp_path / name, images, "--optimizer", name) for name in ("adamw", "muon"))
    vectors = [name for name, change in adamw.items() if change.ndim == 1 and "qkv" not in name]  # a key's bias has no gradient
    assert len(vectors) > 10
    for name in vectors:
        torch.testing.assert_close(muon[name], adamw[name], rtol=1e-3, atol=1e-7)
    name, rate = "encoder.blocks.0.attn.proj.weight", 4e-3 * 8 / 256 / 4
    spread = [torch.linalg.svdvals(changes[name]) for changes in (adamw, muon)]
    assert spread[0][16] < 0.3 * spread[0][0] and spread[1][16] > 0.5 * spread[1][0]  # of 32 singular values
    assert 0.1 < muon[name].pow(2).mean().sqrt() / rate < 0.3  # 0.2 as for AdamW, which is of the order of 1 in a first step


@pytest.mark.parametrize(("precision", "exact"), [("auto", True), ("float32", True), ("bf16", False)])
def test_muon_computes_in_the_precision_of_the_run(precision, exact):
    """Against Newton and Schulz's iteration in float64, x <- a x + (b x x' + c (x x')^2) x, with timm's coefficients."""
    weight = torch.nn.Parameter(torch.zeros(12, 20))
    weight.grad = torch.randn(12, 20)
    options = {"lr": 0.1, "weight_decay": 0.0, "beta2": 0.95, "device": torch.device("cpu")}
    build_optimizer([weight], "muon", precision=precision, **options).step()
    x = weight.grad.double() / weight.grad.double().norm()
    for a, b, c in timm.optim.muon.resolve_ns_coefficients("quintic", timm.optim.muon._COEFFICIENTS):
        product = x @ x.T
        x = a * x + (b * product + c * product @ product) @ x
    error = (weight.detach() + 0.1 * 0.2 * 20**0.5 * x).norm() / weight.detach().norm()
    assert error < 1e-5 if exact else 1e-4 < error < 0.05


def test_muon_resumes_bit_identical(images, tmp_path):
    for name, steps in (("whole", (4,)), ("cut", (2, 4))):
        for last in steps:
            given = ["--optimizer", "muon", "--workers", 0, "--max-steps", last, "--resume"]
            assert pretrain(tmp_path / name, images, *given).code == 0
    assert_identical(end_of(tmp_path / "cut"), end_of(tmp_path / "whole"))


LATE = ["--contrast-from", 0.25, "--projector", 8, "--save-every", 5]
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
    assert [line["step"] for line in map(computed, records(late)) if "loss_con" in line] == [6, 7, 8]  # what the curves show
    for name, given in (("alone", ["--loss-weight", 0]), ("cut", LATE), ("first", [*LATE, "--base-lr", 0])):
        assert pretrain(tmp_path / name, images, "--projector", 8, *given, "--max-steps", 5).code == 0
    alone, cut, first = (end_of(tmp_path / name)["model"] for name in ("alone", "cut", "first"))
    assert cut.keys() == alone.keys() and all(torch.equal(cut[name], alone[name]) for name in cut)
    end = end_of(late)["model"]
    head = [name for name in end if name.startswith("projector.")]
    assert len(head) > 2 and all(torch.equal(cut[name], first[name]) for name in head)
    assert all(not torch.equal(end[name], first[name]) for name in head)
    description = json.loads((tmp_path / "cut" / "run" / "config.json").read_text())
    assert description["loss_weight"] == 2 and description["contrast_from"] == 0.25


@pytest.mark.parametrize("cut", [3, 5])
def test_a_run_cut_before_the_contrastive_loss_begins_ends_bit_identical(late, images, tmp_path, cut):
    for last in (cut, 8):
        assert pretrain(tmp_path, images, *LATE, "--max-steps", last, "--resume").code == 0
    assert_identical(end_of(tmp_path), end_of(late))


def test_two_processes_and_batches_in_parts_begin_it_alike(late, images, tmp_path):
    given = [*ARGUMENTS, "--data", images, "--output-dir", "run", *LATE, "--max-steps", 8]
    results = run_processes("pretrain.py", *map(str, given), folder=tmp_path / "two")
    assert [result.code for result in results] == [0, 0], results
    assert pretrain(tmp_path / "parts", images, *LATE, "--max-steps", 8, "--accumulate", 2).code == 0
    for name in ("two", "parts"):
        assert list(losses(tmp_path / name).values()) == pytest.approx(list(losses(late).values()), rel=1e-4)


def test_the_small_recipe_trains_on_few_images(images, tmp_path):
    given = ["--preset", "small", "--data", images, "--max-steps", 2, "--batch-size", 8, "--workers", 0, "--device", "cpu"]
    result = run_script("pretrain.py", *given, "--log-every", 1, "--monitor-images", 0, folder=tmp_path)
    assert result.code == 0, result.err
    lines = [json.loads(line) for line in (tmp_path / "runs" / "small" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["loss_con"] == 0 for line in lines)  # of 6956
    assert "1.83 M parameters" in result.out and "of 8, 1739 epochs" in result.out  # 44 x sqrt(50 000 / 32)


@pytest.fixture(scope="module")
def white(tmp_path_factory):
    """Images whose crops, flipped or not, are all the same."""
    folder = tmp_path_factory.mktemp("white")
    for i in range(16):
        Image.new("RGB", (48, 40), (255, 255, 255)).save(folder / f"{i}.png")
    return folder


def fixed(folder, images, *arguments):
    """The lines of steps that leave the weights as they are."""
    given = ["--base-lr", 1e-30, "--max-steps", 4, "--epochs", 2, "--workers", 0, *arguments]
    result = pretrain(folder, images, *given)
    assert result.code == 0, result.err
    return [record for record in records(folder) if "loss" in record]


def test_every_step_has_masks_of_its_own(white, tmp_path):
    lines = fixed(tmp_path, white, "--loss-weight", 0)
    assert len(lines) == 4 and len({line["loss_rec"] for line in lines}) == 4  # nothing else differs between the steps


def test_normalised_pixels_can_be_turned_off(white, tmp_path):
    """White is 0 where patches are normalised, and about 2.4 deviations from the mean of ImageNet where they are not."""
    for name, option, low, high in (("on", "--norm-pix", 0, 2), ("off", "--no-norm-pix", 4, 9)):
        assert all(low < line["loss_rec"] < high for line in fixed(tmp_path / name, white, option))


def test_the_temperature_reaches_the_contrastive_loss(images, tmp_path):
    """So high that all are alike: 15 of the 16 views of a step are candidates, each as likely as the others."""
    lines = fixed(tmp_path, images, "--temperature", 1e6)
    assert [line["loss_con"] for line in lines] == pytest.approx([math.log(15)] * 4, rel=1e-5)
    usual = fixed(tmp_path / "usual", images)
    assert all(abs(line["loss_con"] - math.log(15)) > 0.01 for line in usual)


# -------------------------------------------------------------------------------------------------- runs that are cut, etc.


@pytest.mark.posix
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_and_resumed_ends_bit_identical(whole, images, tmp_path, workers):
    arguments = ["--max-steps", 12, "--workers", workers, "--save-every", 5]
    cut = pretrain(tmp_path, images, *arguments, fault="kill@6")
    assert cut.code == -signal.SIGKILL and end_of(tmp_path)["step"] == 5
    resumed = pretrain(tmp_path, images, *arguments, "--resume")
    assert resumed.code == 0 and "resuming run after step 5" in resumed.out
    assert "from random weights" in cut.out and "from random weights" not in resumed.out  # no news in what was asked for
    assert "resume was" not in resumed.out
    assert_identical(end_of(tmp_path), end_of(whole))
    assert losses(tmp_path) == losses(whole)


@pytest.mark.posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_first(whole, images, tmp_path, name):
    number = getattr(signal, name)  # Windows has no SIGUSR1
    started = start(tmp_path, images, "--max-steps", 12, "--workers", 0, fault="slow")
    wait_for_steps(started, tmp_path, 2)
    os.kill(started.pid, number)
    result = started.finish()
    assert result.code == 128 + number
    assert "is saved: run the same command with --resume to continue" in result.err and "error: " not in result.err
    assert 2 <= end_of(tmp_path)["step"] < 12
    assert pretrain(tmp_path, images, "--max-steps", 12, "--workers", 0, "--resume").code == 0
    assert_identical(end_of(tmp_path), end_of(whole))


def test_two_processes_see_the_same_images_crops_and_masks(whole, images, tmp_path):
    arguments = ["--data", images, "--output-dir", "run", *ARGUMENTS, "--max-steps", 12, "--workers", 0]
    results = run_processes("pretrain.py", *arguments, folder=tmp_path)
    assert [result.code for result in results] == [0, 0], results
    assert results[1].out == "" and "Warning" not in results[0].err + results[1].err
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)


def test_two_processes_with_a_normalised_projector_end_with_pictures(images, tmp_path):
    """Which one of them draws alone."""
    given = ["--projector", 8, "--projector-hidden", 8, "--projector-norm", "--max-steps", 1, "--workers", 0]
    results = run_processes("pretrain.py", "--data", images, "--output-dir", "run", *ARGUMENTS, *given, folder=tmp_path)
    assert [result.code for result in results] == [0, 0], results
    assert (tmp_path / "run" / "reconstructions.png").exists()


def test_a_batch_in_parts_gives_the_same_losses(whole, images, tmp_path):
    result = pretrain(tmp_path, images, "--max-steps", 6, "--workers", 0, "--accumulate", 4)
    assert result.code == 0, result.err
    expected = {step: loss for step, loss in losses(whole).items() if step <= 6}
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-5)


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


def test_the_sample_photographs_are_labelled_and_the_accuracy_is_printed(tmp_path):
    arguments = ["--max-steps", 2, "--workers", 0, "--monitor-images", 200]
    result = pretrain(tmp_path, "sample", *arguments)
    assert result.code == 0, result.err
    assert "k-NN accuracy on held-out images: " in result.out.splitlines()[-1]


def png_header(width, height):
    """The first bytes of a PNG that claims to be so large."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + struct.pack(">I", 9) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + chunks + bytes(9)


def test_bad_images_are_replaced_and_listed(images, tmp_path):
    shutil.copytree(images, tmp_path / "odd")
    good = (images / "0.jpg").read_bytes()
    bad = {"empty.jpg": b"", "cut.jpg": good[: len(good) // 2], "text.jpg": b"<html>", "bomb.png": png_header(30000, 30000)}
    for name, content in bad.items():
        (tmp_path / "odd" / name).write_bytes(content)
    (tmp_path / "odd" / "folder.jpg").mkdir()
    (tmp_path / "odd" / "loop").symlink_to(tmp_path / "odd")
    result = pretrain(tmp_path, tmp_path / "odd", "--workers", 1, "--batch-size", 9, "--monitor-images", 99)
    assert result.code == 0, result.err
    listed = (tmp_path / "run" / "bad_files.txt").read_text().splitlines()
    assert {line.split("\t")[0].rpartition("/")[2] for line in listed} == set(bad)
    assert "30000" in next(line for line in listed if "bomb.png" in line)
    refused = pretrain(tmp_path, tmp_path / "odd", "--workers", 1, "--batch-size", 9, "--output-dir", "other", "--max-bad", 2)
    assert refused.code == 1 and "3 bad images, more than the 2 allowed" in refused.err


def test_images_with_four_channels_need_their_statistics(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "arrays").mkdir()
    for i in range(16):
        np.save(tmp_path / "arrays" / f"{i}.npy", rng.integers(0, 255, (40, 48, 4), dtype=np.uint8))
    arguments = ["--in-chans", 4, "--max-steps", 2, "--workers", 0]
    refused = pretrain(tmp_path, "arrays", *arguments)
    assert refused.code == 2 and "--in-chans 4" in refused.err and "--mean and --std 4 numbers" in refused.err
    statistics = ["--mean", *[0.5] * 4, "--std", *[0.25] * 4]
    assert pretrain(tmp_path, "arrays", *arguments, *statistics).code == 0
    config = json.loads((tmp_path / "run" / "encoder" / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == [0.5] * 4 and config["pretrained_cfg"]["input_size"] == [4, 32, 32]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "no/such/folder"], ["no/such/folder"]),
        (["--data", "."], [".jpg", "."]),
        (["--image-size", 30], ["30x30", "multiple of the patch size 8", "32x32"]),
        (["--mask-ratio", 1.0], ["--mask-ratio", "below 1", "1.0"]),
        (["--mask-ratio", -0.1], ["--mask-ratio", "at least 0", "-0.1"]),
        (["--batch-size", 1], ["--batch-size 1", "--loss-weight 0"]),
        (["--device", "cuda"], ["--device cuda", "--device cpu"]),
        (["--encoder", "swin_tiny_patch4_window7_224", "--encoder-args", ""], ["SwinTransformer", "plain ViT"]),
        (["--encoder", "vit_bse_patch16_224"], ["vit_bse_patch16_224", "vit_base_patch16_224"]),
        (["--encoder-args", "embed_dims=3"], ["embed_dims"]),
        (["--loss-on", "some"], ["some", "masked"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(images, tmp_path, arguments, words):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    result = pretrain(tmp_path, images, *arguments)
    assert result.code == 2, result
    line = result.err.strip().splitlines()[-1]
    assert "error: " in line and [word for word in words if word not in line] == []
    assert "Traceback" not in result.err and not (tmp_path / "run" / "checkpoint.pt").exists()


def test_fewer_images_than_a_batch_make_the_batch_and_its_rate(images, tmp_path):
    arguments = ["--batch-size", 256, "--accumulate", 3, "--base-lr", 4e-3, "--max-steps", 1, "--workers", 0]
    result = pretrain(tmp_path, images, *arguments)
    assert result.code == 0, result.err
    assert "--batch-size 256 is more than all 32: 30 take its place, and the learning rate goes with it" in result.out
    assert end_of(tmp_path)["optimizer"]["param_groups"][0]["initial_lr"] == pytest.approx(4e-3 * 30 / 256)
    again = pretrain(tmp_path, images, *arguments, "--max-steps", 2, "--resume")
    assert again.code == 0 and end_of(tmp_path)["step"] == 2, again.err


def test_a_batch_that_the_processes_cannot_share_is_refused(images, tmp_path):
    arguments = ["--data", images, "--output-dir", "run", *ARGUMENTS, "--batch-size", 9]
    for result in run_processes("pretrain.py", *arguments, folder=tmp_path):
        assert result.code == 2 and "9" in result.err and "2 processes" in result.err


def test_a_folder_that_holds_a_run_is_not_overwritten(whole, images, tmp_path):
    shutil.copytree(whole / "run", tmp_path / "run")
    before = (whole / "run" / "checkpoint.pt").read_bytes()
    result = pretrain(tmp_path, images, "--max-steps", 12, "--workers", 0)
    assert result.code == 2 and "holds a run already: add --resume" in result.err
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--encoder-args", SMALL.replace("32", "16")], ["encoder_args", "embed_dim=32", "embed_dim=16"]),
        (["--batch-size", 16], ["batch_size was 8 and is 16 now"]),
        (["--seed", 1], ["seed was 0 and is 1 now"]),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(whole, images, tmp_path, arguments, words):
    shutil.copytree(whole / "run", tmp_path / "run")
    result = pretrain(tmp_path, images, "--max-steps", 12, "--workers", 0, "--resume", *arguments)
    assert result.code == 2 and [word for word in words if word not in result.err] == []


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(whole, images, tmp_path):
    pretrain(tmp_path, images, "--max-steps", 10, "--workers", 0, "--save-every", 5)
    newest = tmp_path / "run" / "checkpoint.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    result = pretrain(tmp_path, images, "--max-steps", 12, "--workers", 0, "--resume")
    assert result.code == 0 and "checkpoint.pt is damaged" in result.err and "resuming run after step 5" in result.out
    assert_identical(end_of(tmp_path), end_of(whole))
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        (tmp_path / "run" / name).write_bytes(b"")
    result = pretrain(tmp_path, images, "--max-steps", 12, "--workers", 0, "--resume")
    assert result.code == 2 and "no checkpoint in run can be read" in result.err
