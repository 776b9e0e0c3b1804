"""Training on a CUDA device, held against the CPU; ``pytest -m cuda``. What is cheap runs on the CPU too, so that it is tried.

Float32 is compared without TF32. Tolerances: 1e-4 of a loss and 1e-3 of the largest gradient for another order of sums in
float32, 2 % of a loss and a cosine of 0.99 between gradients for bf16. Trained weights are compared as a whole: where a
gradient is 0 but for rounding, as of the biases of keys, AdamW still takes steps of full size.
"""

import json
import os
import sys

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts: for deterministic algorithms

import pytest
import torch
import torch.distributed as dist
from running import EXAMPLES, run_processes, run_script
from tiny_run import ARGUMENTS, STEPS, assert_identical, end_of, losses, run_of
from torch.nn.functional import cosine_similarity

import mvmae
from mvmae.data import MultiViewDataset, StepSampler, make_loader, open_images

sys.path.insert(0, str(EXAMPLES))

from engine.ends import Stop
from engine.snapshot import not_finite

from engine import distributed
from engine.checkpoint import load_checkpoint
from engine.distributed import autocast, start_processes, to_device
from engine.optim import cosine_schedule
from tasks.inputs import normalize
from tasks.pretraining import backward

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
BOTH = pytest.mark.parametrize("device", ["cpu", CUDA])
ONLY = pytest.mark.parametrize("device", [CUDA])


@pytest.fixture(autouse=True)
def _plain_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def build(tiny_vit):
    """Builds the same small model on a device, with a projector that normalises over the batch."""

    def build(device):
        torch.manual_seed(0)
        projector = mvmae.projection_mlp(48, 16, 8, batch_norm=True)
        return mvmae.MultiViewMAE(tiny_vit(), decoder_dim=16, decoder_depth=1, decoder_heads=2, projector=projector).to(device)

    return build


def batch(device, step=0, images=8):
    """Views and mask of a step, the same on every device."""
    generator = torch.Generator().manual_seed(step)
    views = torch.randn(images, 2, 3, 32, 32, generator=generator).to(device)
    return views, mvmae.random_mask(2 * images, 16, 0.75, generator=generator, device=device)


def gradients(model, precision="float32", parts=1, trained=None):
    """The losses of a step and the gradients, on the CPU; ``trained`` is the model, compiled."""
    device = next(model.parameters()).device
    with autocast(precision, device):
        found = backward(model if trained is None else trained, *batch(device), parts)
    given = {name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return torch.stack(found).cpu(), given


def assert_close(found, expected, tolerance=1e-3):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance / 10, atol=0)
    assert found[1].keys() == expected[1].keys()
    largest = max(gradient.abs().max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=float(tolerance * largest), msg=name)


def assert_near(build, found, expected):
    """The weights of two runs differ by less than a fifth of the way that they went."""
    start = build("cpu").state_dict()
    apart, way = (
        sum((a[name].double() - b[name].double()).square().sum() for name in start) ** 0.5
        for a, b in ((found["model"], expected["model"]), (expected["model"], start))
    )
    assert apart < 0.2 * way and way > 0


def train(build, folder, device, steps, *, last=None, bad=(), fused=True, after=lambda step: None, **options):
    """Take steps as pretrain.py does; return the state that is saved. ``last`` is that of the schedule, ``bad`` has NaN."""
    model = build(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=fused)
    schedule = cosine_schedule(optimizer, last or steps, 2)
    folder.mkdir(exist_ok=True)
    run = run_of(folder, model, optimizer, steps, device=device, **{"log_every": 4, "save_every": 1000, **options})
    with run:
        for step, _ in run.batches(range(run.step, steps)):
            schedule.step_update(step - 1)
            views, mask = batch(device, step)
            torch.manual_seed(step)
            found = backward(model, views * torch.nan if step in bad else views, mask, 1)
            if run.finite(step, found._asdict(), lambda step=step: [f"{step}.jpg"]):
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.report(step)
            after(step)
            run.checkpoint(step)
    return load_checkpoint(folder)


@BOTH
def test_a_step_is_that_of_the_cpu(build, device, deterministic):
    assert_close(gradients(build(device)), gradients(build("cpu")))


@BOTH
def test_bf16_is_near_float32(build, device):
    model = build(device)
    (low, low_gradients), (full, full_gradients) = gradients(model, "bf16"), gradients(model)
    assert not torch.equal(low, full)  # else nothing was computed in bf16
    torch.testing.assert_close(low, full, rtol=0.02, atol=0)
    flat = [torch.cat([gradient.flatten() for gradient in found.values()]) for found in (low_gradients, full_gradients)]
    assert cosine_similarity(*flat, dim=0) > 0.99


@ONLY
@pytest.mark.filterwarnings("ignore")  # the compiler has advice on TF32, and warnings of its own
def test_a_compiled_step_is_the_eager_one(build, device):
    model = build(device)
    eager = gradients(model)
    assert_close(gradients(model, trained=torch.compile(model)), eager)
    with_bf16 = gradients(model, "bf16", trained=torch.compile(model))
    torch.testing.assert_close(with_bf16[0], eager[0], rtol=0.02, atol=0)


@BOTH
def test_recomputed_activations_change_nothing(build, device):
    model, plain = build(device), gradients(build(device))
    model.encoder.set_grad_checkpointing(True)
    assert_close(gradients(model), plain)


@BOTH
def test_a_batch_in_parts_is_the_whole_batch(build, device):
    model = build(device)
    assert_close(gradients(model, parts=4), gradients(model))


@BOTH
def test_fused_adamw_is_adamw(build, tmp_path, device, deterministic):
    fused, plain = (train(build, tmp_path / str(fused), device, 5, fused=fused) for fused in (True, False))
    assert_near(build, fused, plain)
    assert fused["optimizer"]["state"][0]["step"] == plain["optimizer"]["state"][0]["step"] == 5


@BOTH
def test_a_resumed_run_is_bit_identical(build, tmp_path, device, deterministic):
    whole = train(build, tmp_path / "whole", device, 8)
    train(build, tmp_path / "cut", device, 5, last=8)
    assert_identical(train(build, tmp_path / "cut", device, 8, resume=True), whole)


@BOTH
def test_a_checkpoint_is_read_on_a_cpu(build, tmp_path, device):
    saved = train(build, tmp_path, device, 4, last=6)
    assert {value.device.type for value in saved["model"].values()} == {"cpu"}
    further = train(build, tmp_path, "cpu", 6, resume=True)
    assert further["optimizer"]["state"][0]["step"] == 6
    assert_near(build, further, train(build, tmp_path / "whole", "cpu", 6))


@BOTH
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # the workers are forked beside CUDA's threads
def test_batches_are_not_overwritten_while_they_are_copied(images, device):
    dataset = MultiViewDataset(open_images(str(images)), mvmae.MultiViewTransform(64))

    def batches(device):
        loader = make_loader(dataset, StepSampler(32, 8, num_steps=24), num_workers=1, pin_memory=device.type == "cuda")
        for loaded in loader:
            assert loaded.views.is_pinned() == (device.type == "cuda")
            if device.type == "cuda":
                torch.cuda._sleep(20_000_000)  # the device is busy: copies wait in its queue, and the loader goes on
            yield to_device(loaded.views, device)

    copied = list(batches(torch.device(device)))
    assert len(copied) == 24
    for got, expected in zip(copied, batches(torch.device("cpu")), strict=True):
        assert torch.equal(got.cpu(), expected)


@BOTH
def test_nan_stops_a_run_by_name_and_is_not_saved(build, tmp_path, device):
    with pytest.raises(Stop, match=r"^step 6: loss_con in process 0 is not finite: .*, step 8 is saved"):
        train(build, tmp_path, device, 12, bad=[6])
    saved = load_checkpoint(tmp_path)
    assert saved["skipped"] == 1 and not not_finite(saved)
    assert (tmp_path / "nonfinite.txt").read_text().endswith("'6.jpg'\n")
    end = train(build, tmp_path, device, 12, resume=True)
    assert end["step"] == 12 and end["optimizer"]["state"][0]["step"] == 11


@ONLY
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # does not see every wait, it says
def test_a_step_does_not_wait_for_the_device(build, tmp_path, device):
    model, taken = build(device), []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    pixels = torch.randint(0, 255, (8, 2, 3, 32, 32), dtype=torch.uint8).pin_memory()
    generator, place = torch.Generator(), torch.device("cuda", torch.cuda.current_device())
    with run_of(tmp_path, model, optimizer, 20, device=device, log_every=20, save_every=20) as run:
        for step, _ in run.batches(range(20)):
            quiet = step not in (1, 11, 20)  # a look after the first step, one before the pace is told, one at the end
            torch.cuda.set_sync_debug_mode("error" if quiet else "default")
            try:
                views = normalize(to_device(pixels, place), (0.5,) * 3, (0.5,) * 3)
                torch.manual_seed(step)
                mask = mvmae.random_mask(16, 16, 0.75, generator=generator.manual_seed(step), device=place)
                with autocast("bf16", place):
                    found = backward(model, views, mask, 2)
                assert run.finite(step, found._asdict(), list)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                run.report(step)
                taken.append(step)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            run.checkpoint(step)
    assert taken == list(range(1, 21))


@ONLY
def test_memory_does_not_grow_over_500_steps(build, tmp_path, device):
    held = {}

    def measure(step):
        held[step] = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    train(build, tmp_path, device, 500, after=measure, log_every=20)
    early = [held[step] for step in range(40, 100)]
    late = [held[step] for step in range(440, 500)]
    assert max(allocated for allocated, _ in late) <= max(allocated for allocated, _ in early)
    assert max(reserved for _, reserved in late) == max(reserved for _, reserved in early)


@ONLY
def test_two_processes_on_one_device_are_one_process(images, tmp_path, device):
    given = ["--data", images, "--output-dir", "run", *ARGUMENTS, *STEPS, "--device", device, "--precision", "float32"]
    seen = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    results = run_processes("pretrain.py", *given, folder=tmp_path / "two", env=seen)
    assert [result.code for result in results] == [0, 0], results[0].err
    assert run_script("pretrain.py", *given, folder=tmp_path / "one", env=seen).code == 0
    two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert len(one) == 12 and two.keys() == one.keys()
    assert all(two[step] == pytest.approx(one[step], rel=1e-4) for step in one)


@ONLY
def test_a_script_resumes_bit_identically_and_measures_the_device_s_memory(images, tmp_path, device):
    options = {"env": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}, "patch": be_deterministic}
    given = ["--data", images, "--output-dir", "run", *ARGUMENTS, *STEPS, "--device", device]
    assert run_script("pretrain.py", *given, folder=tmp_path / "whole", **options).code == 0
    assert run_script("pretrain.py", *given, "--max-steps", 7, folder=tmp_path / "cut", **options).code == 0
    assert run_script("pretrain.py", *given, "--resume", folder=tmp_path / "cut", **options).code == 0
    assert_identical(end_of(tmp_path / "cut"), end_of(tmp_path / "whole"))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "run" / "log.jsonl").read_text().splitlines()]
    assert all(line["memory_gb"] > 0 for line in lines if "loss" in line)


def be_deterministic():
    torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize(("devices", "backend", "place"), [(1, "gloo", 0), (2, "nccl", 1), (8, "nccl", 1)])
def test_processes_share_the_devices_where_there_are_more_of_them(monkeypatch, devices, backend, place):
    called = []
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", called.append)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", called.append)
    monkeypatch.setattr(dist, "new_group", lambda backend: backend)
    monkeypatch.setattr(dist, "barrier", called.append)
    found = start_processes("auto")
    assert found == distributed.Processes(1, 2, torch.device("cuda", place), "gloo")
    assert called == [torch.device("cuda", place), backend, "gloo"]
