"""Batches in memory that is filled again: never while anything refers to them."""

import gc

import numpy as np
import pytest
import torch

from mvmae.data import ImageSource, make_loader
from mvmae.data.sampling import Batch, MultiViewDataset, StepSampler
from mvmae.data.shared_memory import Slots
from mvmae.data.views import MultiViewTransform

COUNT, BATCH, STEPS = 50, 5, 60


class Plain(ImageSource):
    """Images of one grey each."""

    def image(self, index):
        return np.full((20, 20, 3), index, np.uint8)


def loader(**options):
    dataset = MultiViewDataset(Plain([b"x"] * COUNT), MultiViewTransform(16))
    return make_loader(dataset, StepSampler(COUNT, BATCH, num_steps=STEPS), num_workers=1, **options)


def greys(views):
    return views.flatten(1).amax(1), views.flatten(1).amin(1)


@pytest.mark.parametrize(
    "keep",
    [
        lambda views: views,
        lambda views: views[2:3],
        lambda views: views[:, 0].numpy(),
        lambda views: iter(views.unbind()),
        lambda views: views.untyped_storage(),
    ],
    ids=["batch", "view", "numpy", "rows", "storage"],
)
def test_what_is_kept_of_a_batch_stays_as_it_is(keep):
    kept = []
    for step, batch in enumerate(loader()):
        assert all(torch.equal(grey, batch.indices) for grey in greys(batch.views))
        if step % 3 == 0:
            part = keep(batch.views)
            kept.append((part, batch.indices.clone()))
        del batch
    assert len(kept) == STEPS // 3
    for part, indices in kept:
        if isinstance(part, torch.UntypedStorage):
            offset = indices.numel() * 2 * 3 * 16 * 16
            storages = {part.data_ptr() for part, _ in kept}
            assert len(storages) == len(kept) and part.nbytes() >= offset
            continue
        rows = torch.stack(list(part)) if not isinstance(part, torch.Tensor | np.ndarray) else torch.as_tensor(part)
        expected = indices[2:3] if len(rows) == 1 else indices
        assert all(torch.equal(grey, expected) for grey in greys(rows))


def test_memory_is_used_again_where_nothing_is_kept():
    places = {batch.views.data_ptr() for batch in loader(prefetch_factor=2)}
    assert len(places) <= 2 + 2


def test_a_second_pass_and_an_abandoned_one_have_memory_of_their_own():
    batches = loader()
    first = iter(batches)
    kept = next(first)
    whole = [(batch.views.clone(), batch.indices) for batch in batches]
    assert len(whole) == STEPS
    assert torch.equal(kept.views, whole[0][0]) and torch.equal(kept.indices, whole[0][1])
    for views, indices in whole:
        assert torch.equal(greys(views)[0], indices)
    first.close()


def test_slots_are_taken_filled_and_given_back():
    slots = Slots(2, 100)
    taken = [slots.take() for _ in range(3)]
    assert taken == [0, 1, -1]
    rows = [torch.arange(10.0), torch.arange(10.0) + 1]
    filled = slots.fill(1, rows)
    assert slots.fill(-1, rows) is None and slots.fill(0, rows * 2) is None  # no slot; 160 bytes do not fit into 128
    tensor = filled.tensor()
    assert torch.equal(tensor, torch.stack(rows)) and tensor.data_ptr() == slots.memory[1].data_ptr()
    part = tensor[1]
    del tensor
    gc.collect()
    assert slots.take() == -1
    del part
    gc.collect()
    assert slots.take() == 1


def test_a_tensor_outlives_its_slots():
    slots = Slots(1, 40)
    tensor = slots.fill(slots.take(), [torch.arange(10.0)]).tensor()
    del slots
    gc.collect()
    assert torch.equal(tensor[0], torch.arange(10.0))


def test_torchs_pinning_copies_a_batch_and_frees_its_slot(monkeypatch):
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())  # pinning itself needs a CUDA device
    slots = Slots(1, 40)
    filled = slots.fill(slots.take(), [torch.arange(10.0)])
    batch = pin_memory(Batch(filled, torch.tensor([0]), []))
    assert torch.equal(batch.views[0], torch.arange(10.0)) and batch.views.data_ptr() != slots.memory.data_ptr()
    gc.collect()
    assert slots.take() == 0
