"""examples/linear_probe.py and tasks/probe.py: the recipes, frozen backbones, heads trained at once, few labels, the table."""

import dataclasses
import json
import shutil
import signal
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from running import EXAMPLES, run_processes, run_script
from sklearn.linear_model import LogisticRegression
from test_finetune import folder as folder  # the same images, the same encoder
from test_finetune import place as place

from mvmae.metrics import knn_accuracy

sys.path.append(str(EXAMPLES))
import linear_probe
from engine.distributed import Ranks
from engine.optim import cosine, set_learning_rate
from engine.options import parse
from engine.signals import Signals
from tasks.features import Pooled
from tasks.probe import Probe, few_label_accuracy, logistic_regression, probe_optimizer, table
from tasks.splits import open_labelled

ONE = Ranks(0, 1, torch.device("cpu"), None)
RUN = ["--preset", "quick", "--device", "cpu", "--batch-size", 8, "--epochs", 4, "--log-every", 4, "--output-dir", "run"]
RUN += ["--data", "images", "--few-shot", 1, 2, "--models"]


def config(*arguments, preset="mocov3"):
    arguments = ["--preset", preset, "--data", "x", "--models", "y", *map(str, arguments)]
    return parse(linear_probe.Config, linear_probe.PRESETS, "", arguments)


def test_the_presets_are_the_recipes_of_moco_v3_and_mae():
    common = {"batch_size": 1024, "epochs": 100, "warmup_epochs": None, "cached": False, "image_size": (), "pool": "avg"}
    mocov3 = {**common, "base_lr": 3.0, "warmup": 0.0, "optimizer": "sgd", "batch_norm": False}
    mae = {**common, "base_lr": 0.1, "warmup": 0.1, "optimizer": "lars", "batch_norm": True}
    for name, recipe in (("mocov3", mocov3), ("mae", mae)):
        parsed = config(preset=name)
        assert {field: getattr(parsed, field) for field in recipe} == recipe
        assert 1.0 in parsed.sweep and parsed.few_shot == (1, 2, 5)


def test_two_steps_of_lars_follow_its_equation():
    probe = Probe(6, 3, multiples=(1.0, 10.0), batch_norm=True)
    optimizer = probe_optimizer(probe, "lars")
    set_learning_rate(optimizer, 0.4)
    wanted = [[p.detach().double() for p in (head.weight, head.bias)] for head in probe.heads]
    velocity = [[torch.zeros_like(p) for p in pair] for pair in wanted]
    for _ in range(2):
        for i, (head, lr) in enumerate(zip(probe.heads, (0.4, 4.0), strict=True)):
            for j, parameter in enumerate((head.weight, head.bias)):
                parameter.grad = torch.randn_like(parameter)
                grad, w = parameter.grad.double(), wanted[i][j]
                local = 0.001 * w.norm() / grad.norm() if j == 0 else 1.0  # the paper's local rate; not for biases
                velocity[i][j] = 0.9 * velocity[i][j] + lr * local * grad
                wanted[i][j] = w - velocity[i][j]
        optimizer.step()
    for head, (weight, bias) in zip(probe.heads, wanted, strict=True):
        assert torch.allclose(head.weight.double(), weight, atol=1e-7) and torch.allclose(head.bias.double(), bias, atol=1e-5)


def test_heads_trained_at_once_end_as_if_each_were_alone():
    probe = Probe(6, 3, multiples=(0.1, 1.0, 3.0), batch_norm=False)
    alone = [torch.nn.Linear(6, 3) for _ in probe.heads]
    for head, own in zip(alone, probe.heads, strict=True):
        head.load_state_dict(own.state_dict())
    optimizer, momentum = probe_optimizer(probe, "sgd"), {}
    for step in range(20):
        features, labels = torch.randn(9, 6), torch.randint(3, (9,))
        set_learning_rate(optimizer, 1.2 * cosine(step + 1, 20, 0))
        sum(torch.nn.functional.cross_entropy(x, labels) for x in probe(features)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for head, multiple in zip(alone, (1.0, 0.1, 3.0), strict=True):  # the recipe's own comes first
            torch.nn.functional.cross_entropy(head(features), labels).backward()
            for parameter in head.parameters():
                momentum[parameter] = 0.9 * momentum.get(parameter, 0) + parameter.grad
                parameter.data -= 1.2 * multiple * (1 + np.cos(np.pi * step / 20)) / 2 * momentum[parameter]
                parameter.grad = None
    assert all(torch.allclose(a.weight, b.weight, atol=1e-5) for a, b in zip(probe.heads, alone, strict=True))


def test_heads_start_small_and_only_maes_normalise_over_the_batch():
    x = 5 + 3 * torch.randn(500, 64)
    for batch_norm, normed in ((False, x), (True, (x - x.mean(0)) / (x.var(0, correction=0) + 1e-6).sqrt())):
        probe = Probe(64, 3, multiples=(1.0,), batch_norm=batch_norm)
        head = probe.heads[0]
        assert head.weight.std().item() == pytest.approx(0.01, rel=0.2) and not head.bias.any()
        assert torch.allclose(probe(x)[0], head(normed), atol=1e-5)
        assert len(list(probe.parameters())) == 2


@pytest.mark.parametrize("name", ["vit", "registers", "no class token", "convnext_atto", "mobilenetv3_small_050"])
def test_features_are_those_of_timm(tiny_vit, name):
    kinds = {"vit": {}, "registers": {"reg_tokens": 2}, "no class token": {"class_token": False, "global_pool": "avg"}}
    model = tiny_vit(**kinds[name]) if name in kinds else timm.create_model(name, num_classes=0)
    images = torch.randn(2, 3, 32, 32)
    pools = ("avg", "token") if getattr(model.eval(), "cls_token", None) is not None else ("avg",)
    for pool in pools:
        pooled = Pooled(model, pool)
        features = pooled.forward_head(pooled.forward_features(images))
        if name in kinds:
            model.reset_classifier(0, pool)
        assert torch.allclose(features, model(images), atol=1e-6)


@pytest.mark.parametrize("cached", [True, False])
def test_every_tensor_of_the_backbone_stays_as_it_was(tmp_path, monkeypatch, folder, cached):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    model = timm.create_model("mobilenetv3_small_050", num_classes=0, drop_rate=0.5, drop_path_rate=0.5)  # batch norm, dropout
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert "bn1.running_mean" in dict(model.named_buffers())
    monkeypatch.setattr("linear_probe.load_backbone", lambda *_, **__: model.train())
    monkeypatch.setattr("linear_probe.starting_weights", lambda *_, **__: {})
    arguments = ["--batch-size", 16, "--epochs", 2, "--workers", 0, "--image-size", 32, "--few-shot", 1]
    settings = dataclasses.replace(config(*arguments), output_dir=str(tmp_path), cached=cached, data=str(folder / "images"))
    result = linear_probe.probe_model(settings, "any", open_labelled(settings.data), ONE, Signals())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert not model.training and all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert 0 <= result["linear"] <= result["best"] <= 100


def test_logistic_regression_is_that_of_scikit_learn():
    x, labels = torch.randn(60, 12, dtype=torch.float64), torch.randint(4, (60,))
    weight, bias = logistic_regression(x, labels, 4, decay=0.01)
    peer = LogisticRegression(C=1 / (0.01 * 60), tol=1e-8, max_iter=10000).fit(x.numpy(), labels.numpy())
    ours, theirs = (x @ weight.T + bias).log_softmax(1), peer.predict_log_proba(x.numpy())
    assert np.allclose(ours.numpy(), theirs, atol=1e-3)


def test_few_labels_are_so_many_of_each_class(monkeypatch):
    seen = []

    def fit(x, labels, num_classes, decay):
        seen.append((x, labels))
        return torch.zeros(num_classes, x.shape[1]), torch.zeros(num_classes)

    monkeypatch.setattr("tasks.probe.logistic_regression", fit)
    labels = torch.tensor([0] * 9 + [1] * 9 + [2])
    bank = torch.arange(1.0, 20).view(-1, 1) * torch.ones(1, 4)
    draws = {few_label_accuracy(bank, labels, bank, labels, 2, seed) for seed in (0, 0, 1)}
    assert all(chosen.bincount().tolist() == [2, 2, 1] for _, chosen in seen)
    assert all(x.norm(dim=1).tolist() == pytest.approx([1.0] * 5) for x, _ in seen)
    assert list(draws) == pytest.approx([100 * 9 / 19])  # all zeros say class 0


@pytest.fixture(scope="module")
def whole(folder):
    """A run with a pretrained and an untrained encoder."""
    done = run_script("linear_probe.py", *RUN, "encoder", "random:convnext_atto", "--image-size", 32, folder=folder)
    assert done.code == 0 and "Warning" not in done.err, done.err
    return done


def state(at, name="encoder"):
    return torch.load(at / "run" / name / "checkpoint.pt", weights_only=True)


def test_a_run_leaves_a_table_and_results_for_each_model(whole, folder):
    run = folder / "run"
    results = json.loads((run / "results.json").read_text())
    assert [result["model"] for result in results] == ["encoder", "random:convnext_atto"]
    assert results[0] == json.loads((run / "encoder" / "results.json").read_text())
    assert {"knn", "linear", "best", "shot1", "shot2_std", "rank"} <= results[0].keys() and results[0]["pool"] == "avg"
    text = (run / "results.md").read_text()
    assert text in whole.out and "±: standard deviation over 5 draws of the labelled images" in whole.out
    assert (run / "random-convnext_atto" / "curves.png").stat().st_size > 1000
    lines = text.splitlines()
    assert [line.count("|") for line in lines] == [lines[0].count("|")] * 4
    assert f"| encoder | {results[0]['knn']:.1f} | {results[0]['linear']:.1f} |" in text
    assert lines[0].endswith("| effective rank |") and lines[2].endswith(f"| {results[0]['rank']:.1f} |")


def test_the_numbers_are_those_of_the_features(whole, folder, monkeypatch):
    monkeypatch.chdir(folder)
    result, data = json.loads((folder / "run" / "encoder" / "results.json").read_text()), open_labelled("images")
    vit = timm.create_model("local-dir:encoder", pretrained=True).eval()
    transform, sets = timm.data.create_transform(**timm.data.resolve_model_data_config(vit)), []
    for part in (data.train, data.val):
        images = torch.stack([transform(Image.open(part.name(i))) for i in range(len(part))])
        with torch.no_grad():
            sets.append((vit.forward_features(images)[:, 1:].mean(1), torch.as_tensor(part.labels)))
    assert result["knn"] == pytest.approx(100 * knn_accuracy(*sets[0], *sets[1]))
    weight, bias = (state(folder)["model"][f"heads.0.{name}"] for name in ("weight", "bias"))
    right = (sets[1][0] @ weight.T + bias).argmax(1) == sets[1][1]
    assert result["linear"] == pytest.approx(100 * right.float().mean().item())


@pytest.mark.posix
@pytest.mark.parametrize("cached", [True, False])
def test_a_run_killed_and_resumed_ends_bit_identical(place, cached):
    options = [*RUN, "encoder", "--save-every", 5, *([] if cached else ["--no-cached"])]
    assert run_script("linear_probe.py", *options, folder=place).code == 0
    expected, numbers = state(place), json.loads((place / "run" / "results.json").read_text())
    (place / "run").rename(place / "before")
    cut = run_script("linear_probe.py", *options, folder=place, fault="kill@7")
    assert cut.code == -signal.SIGKILL and state(place)["step"] == 5
    done = run_script("linear_probe.py", *options, "--resume", "--workers", 0 if cached else 2, folder=place)
    assert done.code == 0 and "resuming run/encoder after step 5" in done.out, done.err
    assert all(torch.equal(value, state(place)["model"][key]) for key, value in expected["model"].items())
    again = json.loads((place / "run" / "results.json").read_text())
    assert {**again[0], "seconds": 0} == {**numbers[0], "seconds": 0}


def test_two_processes_find_what_one_does(whole, folder, place):
    both = run_processes("linear_probe.py", *RUN, "encoder", "--image-size", 32, folder=place)
    assert [done.code for done in both] == [0, 0] and both[1].out == "", both
    result = json.loads((place / "run" / "results.json").read_text())[0]
    expected = json.loads((folder / "run" / "results.json").read_text())[0]
    assert result["knn"] == expected["knn"]
    ours, theirs = state(place)["model"], state(folder)["model"]
    assert all(torch.allclose(value, theirs[key], atol=1e-4) for key, value in ours.items())


@pytest.mark.parametrize(("preset", "options"), [("mae", ["--no-cached", "--sweep", 1, 10000]), ("quick", ["--sweep", 1, 10])])
def test_colours_are_told_apart_by_a_linear_layer(place, preset, options):
    options = [*options, "--preset", preset, "--epochs", 12, "--warmup-epochs", 1, "--workers", 0]
    done = run_script("linear_probe.py", *RUN, "encoder", *options, folder=place)
    assert done.code == 0, done.err
    result = json.loads((place / "run" / "results.json").read_text())[0]
    assert result["best"] > 90 and "an end of --sweep" in done.out
    assert [name for name, value in result.items() if isinstance(value, float) and value != round(value, 2)] == []


def test_a_cell_of_the_table_without_a_number_is_empty():
    lines = table([{"model": "a", "linear": 1.26}, {"model": "b", "shot1": 2.0, "shot1_std": 0.5}]).splitlines()
    assert lines[0] == "| model | k-NN | linear | best on val | 1 label per class | effective rank |"
    assert lines[2:] == ["| a |  | 1.3 |  |  |  |", "| b |  |  |  | 2.0 ± 0.5 |  |"]


@pytest.mark.posix
@pytest.mark.parametrize(("cached", "images"), [("--cached", 47), ("--no-cached", 48)])
def test_fewer_images_than_a_batch_make_the_batch_and_its_rate(place, cached, images):
    some = shutil.copytree(place / "images", place / "some")
    next((some / "train").glob("*/0.png")).write_bytes(b"no image")
    options = ["--batch-size", 1024, "--warmup-epochs", 0, "--base-lr", 3, "--epochs", 2, "--save-every", 1, cached]
    options += ["--data", "some", "--log-every", 1]
    cut = run_script("linear_probe.py", *RUN, "encoder", *options, folder=place, fault="kill@1")
    assert cut.code == -signal.SIGKILL
    done = run_script("linear_probe.py", *RUN, "encoder", *options, "--resume", folder=place)
    assert done.code == 0, done.err
    assert f"2 steps of {images} on cpu; --batch-size 1024 is more than all {images}: {images} take its place" in done.out
    assert "resuming run/encoder after step 1" in done.out
    lines = [json.loads(line) for line in (place / "run" / "encoder" / "log.jsonl").read_text().splitlines()]
    (last,) = [line for line in lines if line["step"] == 2 and "lr" in line]
    assert last["lr"] == pytest.approx(3 * images / 256 / 2)  # half-way down the cosine
