"""The GPU of a Mac, which no test machine has: the choice of the device, and that no float64 tensor is made on it.

A stand-in plays the device: its tensors are kept on the CPU, call themselves another device's, and refuse float64 as torch's
MPS does, with its own words.
"""

import os
import sys
import types
from contextlib import nullcontext

import pytest
import timm
import torch
from running import EXAMPLES, run_script
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

sys.path.insert(0, str(EXAMPLES))

import benchmark
from engine.distributed import Ranks, autocast, start_ranks, to_device
from engine.signals import Stop
from mvmae import MultiViewMAE, accumulation, metrics
from mvmae.visualize import pca_colours
from tasks import labelled, probe

STAND_IN = torch.device("meta")
MPS = torch.device("mps")


class Kept(torch.Tensor):
    """A tensor of the stand-in, with its values on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values):
        kept = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), dtype=values.dtype, device=STAND_IN
        )
        kept.values = values
        return kept

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def dispatch(func, args, kwargs):
    """Compute on the CPU; what comes from the stand-in, or is asked for there, stays there."""
    kept = {}

    def take(value):
        if isinstance(value, Kept):
            kept[id(value.values)] = value
            return value.values
        return value

    args, kwargs = tree_map(take, (args, kwargs))
    there = bool(kept)
    if kwargs.get("device") is not None:
        there, kwargs = torch.device(kwargs["device"]) == STAND_IN, {**kwargs, "device": torch.device("cpu")}

    def give(value):
        if not there or not isinstance(value, torch.Tensor):
            return value
        if value.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return kept.get(id(value)) if id(value) in kept else Kept(value)

    return tree_map(give, func(*args, **kwargs))


class StandIn(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


@pytest.fixture
def stand_in(monkeypatch):
    """Tensors can go ``to(STAND_IN)``, which has no float64."""
    monkeypatch.setattr(metrics, "WITHOUT_FLOAT64", (STAND_IN.type,))
    with StandIn():
        yield


FEATURES, OTHERS, LABELS = torch.randn(2, 40, 8).unbind()[0], torch.randn(40, 8), torch.arange(40) % 3
MEASURES = {
    "k-NN": lambda x, y, labels: metrics.knn_accuracy(x, labels, y, labels, k=5),
    "rank": lambda x, y, labels: metrics.effective_rank(x, chunk_size=16),
    "uniformity": lambda x, y, labels: metrics.uniformity(x, chunk_size=16),
    "cosine": lambda x, y, labels: metrics.mean_cosine(x, y),
    "CKA": lambda x, y, labels: metrics.linear_cka(x, y),
    "few labels": lambda x, y, labels: probe.few_label_accuracy(x, labels, y, labels, 5, seed=0),
    "accuracy": lambda x, y, labels: labelled.accuracy(x, labels)["val_loss"],
    "PCA": lambda x, y, labels: pca_colours(x[:32].view(2, 16, 8), (4, 4)).mean().item(),
}


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_makes_no_float64_on_a_device_that_has_none(name, stand_in, monkeypatch):
    measure = MEASURES[name]
    expected = measure(FEATURES, OTHERS, LABELS)
    there = [x.to(STAND_IN) for x in (FEATURES, OTHERS, LABELS)]
    assert all(isinstance(x, Kept) for x in there)
    assert measure(*there) == pytest.approx(expected, rel=1e-5)
    if name == "k-NN":  # which makes none anywhere
        return
    monkeypatch.setattr(metrics, "WITHOUT_FLOAT64", ())  # a measure that would make it is found
    with pytest.raises(TypeError, match="doesn't support float64"):
        measure(*there)


def test_the_forward_pass_of_pretraining_makes_no_float64(tiny_vit, stand_in, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which does not know the stand-in
    model = MultiViewMAE(tiny_vit(), decoder_dim=16, decoder_depth=1, decoder_heads=2)
    views, generator = torch.randn(3, 2, 3, 32, 32), torch.Generator()
    with torch.no_grad():
        expected = model(views, generator=generator.manual_seed(0)).loss
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                table.update({name: value.to(STAND_IN) for name, value in table.items() if value is not None})
        found = model(views.to(STAND_IN), generator=generator.manual_seed(0)).loss
    assert isinstance(found, Kept) and float(found) == pytest.approx(float(expected), rel=1e-5)


def test_positions_are_converted_before_they_go_to_the_device(monkeypatch):
    copied, copy = [], torch.Tensor.copy_

    def watched(tensor, other, *args):
        copied.append(other.dtype)
        return copy(tensor, other, *args)

    monkeypatch.setattr(torch.Tensor, "copy_", watched)
    timm.create_model("mvmae_vit_tiny_patch16", img_size=32, depth=1)
    MultiViewMAE("mvmae_vit_tiny_patch16", decoder_depth=1)
    assert copied and torch.float64 not in copied


def test_a_mac_s_gpu_is_taken_where_it_is_there_and_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert start_ranks("mps") == Ranks(0, 1, MPS, None)
    assert start_ranks("auto").device.type == "cpu"  # nobody has tried it yet
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(Stop, match="--device mps must run in one process, got 2: start the script without torchrun"):
        start_ranks("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(Stop, match="--device mps: torch finds no MPS device"):
        start_ranks("mps")


ENCODER = {"adapt": "--encoder", "linear_probe": "--models", "visualize": "--models"}  # the option that names it
ENCODER |= dict.fromkeys(["finetune", "detect", "segment", "embed"], "--model")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has the GPU of a Mac")
@pytest.mark.parametrize("name", ["pretrain", "benchmark", *ENCODER])
def test_every_script_names_the_device_that_is_not_there(name, tmp_path):
    typed = [] if name == "benchmark" else ["--data", "sample"]
    typed += [ENCODER[name], "mvmae_vit_micro_patch8_64"] if name in ENCODER else []
    done = run_script(f"{name}.py", *typed, "--device", "mps", folder=tmp_path)
    assert done.code == 2 and done.out == "" and done.err.count("\n") == 1
    assert done.err.startswith("error: --device mps: torch finds no MPS device")


def test_precision_is_float32_there_unless_bf16_is_asked_for():
    assert not autocast("auto", MPS)._enabled and not autocast("float32", MPS)._enabled
    assert autocast("bf16", MPS).fast_dtype == torch.bfloat16


@pytest.mark.parametrize(("device", "waits"), [("mps", True), ("cpu", True), ("cuda", False)])
def test_only_on_cuda_a_copy_is_not_waited_for(device, waits):
    asked = []
    tensor = types.SimpleNamespace(to=lambda device, non_blocking: asked.append((device.type, non_blocking)))
    to_device(tensor, torch.device(device))
    assert asked == [(device, not waits)]


def test_times_wait_for_the_device(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    benchmark.clock({"a": lambda: None, "b": lambda: None}, 2, MPS, 1)
    assert waited == [MPS] * 2 * 3


def test_a_batch_in_parts_draws_again_what_the_device_drew(monkeypatch):
    state = [torch.tensor([7], dtype=torch.uint8)]
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new: state.__setitem__(0, new))
    before = accumulation._random_state(MPS)
    state[0] = torch.tensor([8], dtype=torch.uint8)
    accumulation._set_random_state(before, MPS)
    assert state[0] == 7
