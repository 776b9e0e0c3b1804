import pytest
import torch

from mvmae import patchify, unpatchify
from mvmae.patches import denormalize_patches, normalize_patches, sincos_table


@pytest.mark.parametrize(("shape", "patch_size"), [((2, 3, 32, 48), 8), ((1, 4, 12, 20), (6, 5)), ((2, 1, 3, 3), 1)])
def test_patchify_equals_slow_loops_and_unpatchify_undoes_it(shape, patch_size):
    images = torch.randn(shape)
    ph, pw = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    patches = patchify(images, patch_size)
    rows, columns = shape[2] // ph, shape[3] // pw
    for b in range(shape[0]):
        for row in range(rows):
            for column in range(columns):
                expected = [
                    images[b, c, row * ph + y, column * pw + x] for y in range(ph) for x in range(pw) for c in range(shape[1])
                ]
                assert torch.equal(patches[b, row * columns + column], torch.stack(expected))
    assert torch.equal(unpatchify(patches, patch_size, (rows, columns), shape[1]), images)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: patchify(torch.zeros(1, 3, 30, 32), 8), "multiple of the patch size 8, got 30x32: the nearest is 32x32"),
        (lambda: patchify(torch.zeros(3, 30, 32), 8), r"\(B, C, H, W\), got \(3, 30, 32\)"),
        (lambda: sincos_table(18, (2, 2)), "multiple of 4 .*, got 18"),
        (lambda: unpatchify(torch.zeros(1, 15, 192), 8, (4, 4), 3), r"\(B, 16, 192\) for a grid of 4x4"),
    ],
)
def test_wrong_sizes_are_named_with_the_cure(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_normalisation_is_per_patch_and_has_an_inverse():
    patches = torch.randn(2, 5, 48, dtype=torch.float64) * 3 + 7
    normalized = normalize_patches(patches)
    for patch, result in zip(patches.flatten(0, 1), normalized.flatten(0, 1), strict=True):
        mean = sum(patch) / 48
        variance = sum((patch - mean) ** 2) / 47
        torch.testing.assert_close(result, (patch - mean) / (variance + 1e-6) ** 0.5)
    torch.testing.assert_close(denormalize_patches(normalized, patches), patches)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_patches_normalise_to_zero(value):
    assert torch.equal(normalize_patches(torch.full((1, 2, 12), value)), torch.zeros(1, 2, 12))
    assert torch.equal(normalize_patches(torch.full((1, 2, 1), value)), torch.zeros(1, 2, 1))


def test_positions_equal_a_slow_loop_with_the_column_first():
    table = sincos_table(16, (2, 3))
    for row in range(2):
        for column in range(3):
            halves = []
            for place in (column, row):
                angles = torch.tensor([place / 10000 ** (i / 4) for i in range(4)], dtype=torch.float64)
                halves += [angles.sin(), angles.cos()]
            torch.testing.assert_close(table[row * 3 + column], torch.cat(halves))
