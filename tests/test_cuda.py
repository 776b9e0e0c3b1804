"""Training on a CUDA device, held against the CPU; ``pytest -m cuda``. What takes no script runs on the CPU too, to be tried.

Float32 is compared without TF32. Tolerances: 1e-4 of a loss and 1e-3 of the largest gradient for another order of sums in
float32, 2 % of a loss and a cosine of 0.99 between gradients for bf16.
"""

import json
import os
import sys
import types

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts: for deterministic algorithms

import pytest
import torch
import torch.distributed as dist
from running import EXAMPLES, after_each_step, run_processes, run_script
from tiny_run import ARGUMENTS, STEPS, assert_identical, end_of, losses
from torch.nn.functional import cosine_similarity

import mvmae
from mvmae.data import Loader, MultiViewDataset, StepSampler, normalize, open_images

sys.path.insert(0, str(EXAMPLES))

from engine.distributed import Ranks, autocast, start_ranks, to_device
from engine.optim import build_optimizer

DEVICE = "cuda"
BOTH = pytest.mark.parametrize("device", ["cpu", pytest.param(DEVICE, marks=pytest.mark.cuda)])


@pytest.fixture(autouse=True)
def _plain_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def build(tiny_vit):
    """Builds the same small model on a device, with a projector that normalises over the batch."""

    def build(device):
        torch.manual_seed(0)
        projector = mvmae.projection_mlp(48, 16, 8, batch_norm=True)
        return mvmae.MultiViewMAE(tiny_vit(), decoder_dim=16, decoder_depth=1, decoder_heads=2, projector=projector).to(device)

    return build


def gradients(model, precision="float32", parts=1, compiled=False):
    """The losses and the gradients of a step on 8 images, the same on every device; on the CPU."""
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(0)
    views = torch.randn(8, 2, 3, 32, 32, generator=generator).to(device)
    mask = mvmae.random_mask(16, 16, 0.75, generator=generator, device=device)
    with autocast(precision, device):
        found = mvmae.backward_in_parts(torch.compile(model) if compiled else model, views, parts, mask=mask)
    given = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return torch.stack(found).cpu(), given


def assert_close(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=0)
    assert found[1].keys() == expected[1].keys()
    largest = max(gradient.abs().max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=float(1e-3 * largest), msg=name)


@BOTH
def test_a_step_is_that_of_the_cpu_in_parts_and_with_recomputed_activations_too(build, device):
    model, expected = build(device), gradients(build("cpu"))
    assert_close(gradients(model), expected)
    assert_close(gradients(model, parts=4), expected)
    model.encoder.set_grad_checkpointing(True)
    assert_close(gradients(model), expected)


@BOTH
def test_bf16_is_near_float32(build, device):
    model = build(device)
    (low, low_gradients), (full, full_gradients) = gradients(model, "bf16"), gradients(model)
    assert not torch.equal(low, full)  # else nothing was computed in bf16
    torch.testing.assert_close(low, full, rtol=0.02, atol=0)
    flat = [torch.cat([gradient.flatten() for gradient in found.values()]) for found in (low_gradients, full_gradients)]
    assert cosine_similarity(*flat, dim=0) > 0.99


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore")  # the compiler has advice on TF32, and warnings of its own
def test_a_compiled_step_is_the_eager_one(build):
    model = build(DEVICE)
    eager = gradients(model)
    assert_close(gradients(model, compiled=True), eager)
    torch.testing.assert_close(gradients(model, "bf16", compiled=True)[0], eager[0], rtol=0.02, atol=0)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # does not see every wait, it says
def test_only_the_check_of_its_losses_lets_a_step_wait_for_the_device(build):
    model, device = build(DEVICE), torch.device(DEVICE, 0)
    optimizer = build_optimizer([{"params": [*model.parameters()]}], "adamw", lr=1e-3, precision="bf16", device=device)
    pixels = torch.randint(0, 255, (8, 2, 3, 32, 32), dtype=torch.uint8).pin_memory()
    try:
        for step in range(3):
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first copies what stays on the device
            views = normalize(to_device(pixels, device), (0.5,) * 3, (0.5,) * 3)
            mask = mvmae.random_mask(16, 16, 0.75, generator=torch.Generator(), device=device)
            with autocast("bf16", device):
                mvmae.backward_in_parts(model, views, 2, mask=mask)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@BOTH
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # the workers are forked beside CUDA's threads
def test_batches_are_not_overwritten_while_they_are_copied(images, device):
    dataset = MultiViewDataset(open_images(str(images)), mvmae.MultiViewTransform(64))

    def batches(device):
        cuda = device.type == "cuda"
        for loaded in Loader(dataset, StepSampler(32, 8, num_steps=24), num_workers=1, pin_memory=cuda):
            assert loaded.views.is_pinned() == cuda
            if cuda:
                torch.cuda._sleep(20_000_000)  # the device is busy: copies wait in its queue, and the loader goes on
            yield to_device(loaded.views, device)

    copied = list(batches(torch.device(device)))
    assert len(copied) == 24
    for got, expected in zip(copied, batches(torch.device("cpu")), strict=True):
        assert torch.equal(got.cpu(), expected)


def run(folder, images, *arguments, script=run_script, **options):
    """Run pretrain.py on the device; return how it ended."""
    given = ["--data", images, "--output-dir", "run", *ARGUMENTS, *STEPS, "--device", DEVICE, *arguments]
    return script("pretrain.py", *given, folder=folder, **options)


@pytest.mark.cuda
def test_a_resumed_run_is_bit_identical_and_tells_of_the_device_s_memory(images, tmp_path):
    for folder, *arguments in (["whole"], ["cut", "--max-steps", 7], ["cut", "--resume"]):
        result = run(tmp_path / folder, images, *arguments, patch=be_deterministic)
        assert result.code == 0, result.err
    assert_identical(end_of(tmp_path / "cut"), end_of(tmp_path / "whole"))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "run" / "log.jsonl").read_text().splitlines()]
    assert all(line["memory_gb"] > 0 for line in lines if "loss" in line)


def be_deterministic():
    torch.use_deterministic_algorithms(True)


@pytest.mark.cuda
def test_a_run_goes_on_on_a_cpu(images, whole, tmp_path):
    for arguments in (["--max-steps", 7], ["--resume", "--device", "cpu"]):
        result = run(tmp_path, images, "--precision", "float32", *arguments)
        assert result.code == 0, result.err
    found, expected = losses(tmp_path), losses(whole)
    assert len(expected) == 12 and found == pytest.approx(expected, rel=0.01)  # the convolution is in TF32 there


@pytest.mark.cuda
def test_a_step_that_is_not_finite_stops_the_run_before_the_optimizer(one_bright, tmp_path):
    result = run(tmp_path, one_bright, "--mean", 0, 0, 0, "--std", *[1e-30] * 3, "--max-steps", 4, "--loss-weight", 0)
    assert result.code == 1 and "is not finite" in result.err and "Traceback" not in result.err
    first, *names = (tmp_path / "run" / "nonfinite.txt").read_text().splitlines()
    end = end_of(tmp_path)
    assert first.startswith(f"step {end['step'] + 1}: loss") and any("/7.png" in name for name in names)
    assert all(value.isfinite().all() for value in end["model"].values())
    assert all(state["step"] == end["step"] for state in end["optimizer"]["state"].values())


@pytest.mark.cuda
def test_memory_does_not_grow_over_500_steps(images, tmp_path):
    result = run(tmp_path, images, "--steps", 500, "--max-steps", 500, "--save-every", 20, patch=compare_memory)
    assert result.code == 0 and end_of(tmp_path)["step"] == 500, result.err


def compare_memory():
    held = []

    def act(step):
        held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
        if step == 500:
            (early, reserved_early), (late, reserved_late) = (map(max, zip(*held[i : i + 60], strict=True)) for i in (40, 440))
            assert late <= early and reserved_late == reserved_early

    after_each_step(act)


@pytest.mark.cuda
def test_two_processes_on_one_device_are_one_process(images, tmp_path):
    options = {"env": {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}}
    results = run(tmp_path / "two", images, "--precision", "float32", script=run_processes, **options)
    assert [result.code for result in results] == [0, 0], results[0].err
    assert run(tmp_path / "one", images, "--precision", "float32", **options).code == 0
    two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(one) == 12 and two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize(("devices", "backend", "place"), [(1, "gloo", 0), (2, "nccl", 1), (8, "nccl", 1)])
def test_processes_share_the_devices_where_there_are_more_of_them(monkeypatch, devices, backend, place):
    called = []
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", called.append)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    store = types.SimpleNamespace(set_timeout=lambda _: None)
    monkeypatch.setattr("engine.distributed.rendezvous", lambda *_, **__: iter([(store, 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: called.append(backend))
    monkeypatch.setattr(dist, "new_group", lambda backend: backend)
    monkeypatch.setattr(dist, "barrier", called.append)
    assert start_ranks("auto") == Ranks(1, 2, torch.device("cuda", place), "gloo")
    assert called == [torch.device("cuda", place), backend, "gloo"]


@pytest.mark.cuda
def test_the_benchmark_measures_speed(tmp_path):
    typed = ["--encoder", "vit_tiny_patch16_224", "--batch-size", 64, "--rounds", 1, "--precision", "bf16"]
    result = run_script("benchmark.py", *typed, "--parts", "step", "--device", DEVICE, folder=tmp_path)
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "runs" / "benchmark" / "benchmark.json").read_text())["step"]
    assert all(row["per_second"] > 0 for row in found.values())
    assert 0 < found["ours"]["mfu"] < 1 and found["ours"]["memory_gb"] > 0
