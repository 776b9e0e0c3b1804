"""mvmae.projector: the head before the contrastive loss, and its batch normalisation over all processes."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mvmae import projection_mlp
from mvmae.projector import BatchNorm


def layers(module):
    return [type(layer).__name__ for layer in module]


def test_the_layers_of_the_head():
    assert layers(projection_mlp(6, 5, 4)) == ["Linear", "ReLU", "Linear"]
    assert layers(projection_mlp(6, 5, 4, depth=1)) == layers(projection_mlp(6, 5, 4, depth=1, batch_norm=True)) == ["Linear"]
    head = projection_mlp(6, 5, 4, depth=3, batch_norm=True)
    assert layers(head) == ["Linear", "BatchNorm", "ReLU", "Linear", "BatchNorm", "ReLU", "Linear"]
    assert [layer.weight.shape for layer in head if isinstance(layer, nn.Linear)] == [(5, 6), (5, 5), (4, 5)]
    assert all(layer.bias is None for layer in head if isinstance(layer, nn.Linear))
    with pytest.raises(ValueError, match="depth of a projection head must be at least 1 layer, got 0"):
        projection_mlp(6, depth=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_normalisation_equals_torchs_in_training(dtype):
    torch.manual_seed(0)
    ours, theirs = BatchNorm(7, eps=1e-3).to(dtype), nn.BatchNorm1d(7, eps=1e-3, dtype=dtype)
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        nn.init.normal_(parameter)
        other.data.copy_(parameter.data)
    found, x = [], 3 + 2 * torch.randn(33, 7, dtype=dtype)
    for norm in (ours, theirs, ours.eval()):  # in evaluation too: there are no running statistics
        rows = x.clone().requires_grad_()
        norm.zero_grad()
        result = norm(rows)
        result.square().mul(torch.arange(7)).sum().backward()
        found.append((result.detach(), rows.grad, *(parameter.grad.clone() for parameter in norm.parameters())))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    for one, two, three in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)
        assert torch.equal(one, three)


def test_under_autocast_statistics_are_in_float32():
    rows = 1000 + torch.randn(64, 3)  # bfloat16 would keep nothing of the differences
    with torch.autocast("cpu", torch.bfloat16):
        result = BatchNorm(3)(rows)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.std(dim=0, correction=0), torch.ones(3), rtol=1e-3, atol=0)


def half(x):
    torch.manual_seed(1)
    norm, rank = BatchNorm(5).double(), dist.get_rank()
    rows = x.chunk(2)[rank].clone().requires_grad_()
    result = norm(rows)
    (result**3).sum().backward()
    return result.detach(), rows.grad, norm.weight.grad, norm.bias.grad


def test_two_processes_normalise_as_one(two_processes):
    x = torch.randn(12, 5, dtype=torch.float64)
    whole, norm = x.clone().requires_grad_(), BatchNorm(5).double()
    result = norm(whole)
    (result**3).sum().backward()
    halves = two_processes(half, x)
    torch.testing.assert_close(torch.cat([part[0] for part in halves]), result.detach())
    torch.testing.assert_close(torch.cat([part[1] for part in halves]), whole.grad)
    torch.testing.assert_close(halves[0][2] + halves[1][2], norm.weight.grad)  # the mean of them is DistributedDataParallel's
    torch.testing.assert_close(halves[0][3] + halves[1][3], norm.bias.grad)
