from decimal import ROUND_HALF_EVEN, Decimal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mvmae import Mask, num_visible, random_mask


def test_the_number_of_visible_patches_is_exact_where_floats_are_not():
    assert [num_visible(length, 0.8) for length in (200, 100, 64, 196, 5)] == [40, 20, 13, 39, 1]
    for length in range(20, 260):
        for percent in (5, 25, 50, 60, 75, 80, 90):
            expected = (Decimal(length) * (100 - percent) / 100).to_integral_value(ROUND_HALF_EVEN)
            assert num_visible(length, percent / 100) == expected


def test_the_two_parts_of_a_mask_agree():
    visible, masked = random_mask(5, 20, 0.8)
    assert visible.shape == (5, 4) and masked.sum(dim=1).tolist() == [16] * 5
    for b in range(5):
        assert [i for i in range(20) if not masked[b, i]] == visible[b].tolist()


def test_every_patch_is_masked_as_often_as_any_other():
    share = random_mask(20_000, 10, 0.7, generator=torch.Generator().manual_seed(1)).masked.double().mean(dim=0)
    assert (share - 0.7).abs().max() < 5 * (0.7 * 0.3 / 20_000) ** 0.5


def test_a_generator_decides_alone():
    first, second = (random_mask(3, 16, 0.5, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    before = torch.get_rng_state()
    other = random_mask(3, 16, 0.5, generator=torch.Generator().manual_seed(8))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.masked, second.masked) and not torch.equal(first.masked, other.masked)


class Sorted(TorchDispatchMode):
    """Remembers how many rows each sort sorts."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "sort" in func.__name__:
            self.rows.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def test_some_of_the_masks_are_those_of_all_bit_for_bit_and_are_sorted_alone():
    def draw(**rows):
        return random_mask(12, 25, 0.75, generator=torch.Generator().manual_seed(3), **rows)

    expected = draw().select(slice(4, 8))
    with Sorted() as seen:
        found = draw(rows=slice(4, 8))
    assert all(map(torch.equal, found, expected)) and [x.dtype for x in found] == [x.dtype for x in expected]
    assert seen.rows and set(seen.rows) == {4}


def test_a_mask_of_ones_own():
    masked = torch.tensor([[True, False, True, False], [False, False, True, True]])
    mask = Mask.from_masked(masked)
    assert mask.visible.tolist() == [[1, 3], [0, 1]] and torch.equal(mask.masked, masked)
    drawn = random_mask(6, 9, 0.5)
    for built, part in zip(Mask.from_masked(drawn.masked), drawn, strict=True):
        assert torch.equal(built, part)
    assert torch.equal(drawn.select(slice(2, 4)).visible, drawn.visible[2:4])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: num_visible(4, 0.95), r"must leave one of 4 patches visible, got .*: use at most 0\.75"),
        *((lambda ratio=ratio: num_visible(196, ratio), r"in \[0, 1\) .*, got") for ratio in (1.0, -0.1, 1.5, float("nan"))),
        (lambda: Mask.from_masked(torch.tensor([[True, False], [False, False]])), "the same number of patches visible"),
        (lambda: Mask.from_masked(torch.ones(2, 3, dtype=torch.bool)), "at least 1, got"),
        (lambda: Mask.from_masked(torch.zeros(1, 4)), r"must be torch.bool .*, got torch.float32"),
    ],
)
def test_ratios_and_masks_that_leave_nothing_or_no_equal_number_are_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
