"""Shared memory that loading processes reuse: new pages for every batch cost a fifth of a worker's time."""

import math
import weakref
from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64
_numbers = count()
_all: "weakref.WeakValueDictionary[int, Slots]" = weakref.WeakValueDictionary()


class Slots:
    """Buffers for batches, each free again once nothing refers to the batch that was in it.

    The main process takes a free slot for each batch that it requests, a worker fills the slot, and the main process makes a
    tensor of it. A batch that is kept keeps its slot; without a free slot, a batch uses new memory.

    Args:
        number: number of slots.
        size: bytes of each slot.
    """

    def __init__(self, number: int, size: int) -> None:
        size = -(-size // ALIGNMENT) * ALIGNMENT
        self.memory = torch.empty(number, size, dtype=torch.uint8).share_memory_()
        self.free, self.key = deque(range(number)), next(_numbers)
        _all[self.key] = self

    def __getstate__(self) -> dict[str, Any]:
        return {"memory": self.memory, "key": self.key}  # all that a worker needs

    def take(self) -> int:
        """Return the number of a free slot, or -1 if there is none."""
        try:
            return self.free.popleft()
        except IndexError:
            return -1

    def fill(self, slot: int, tensors: Sequence[Tensor]) -> "Filled | None":
        """Stack tensors of one shape and type in a slot; return None if they do not fit into it."""
        first = tensors[0]
        shape = (len(tensors), *first.shape)
        if slot < 0 or math.prod(shape) * first.element_size() > self.memory.shape[1]:
            return None
        torch.stack(list(tensors), out=_shaped(self.memory[slot], shape, first.dtype))
        return Filled(self.key, slot, shape, first.dtype)

    def tensor(self, filled: "Filled") -> Tensor:
        """Return a slot's content, without a copy. The slot is free once no tensor shares this one's memory."""
        row = self.memory[filled.slot].numpy()
        weakref.finalize(row, self.free.append, filled.slot)  # torch keeps the array for as long as its memory is in use
        return _shaped(torch.from_numpy(row), filled.shape, filled.dtype)


class Filled:
    """The place of a tensor in shared memory, which a worker sends instead of the tensor."""

    def __init__(self, key: int, slot: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.key, self.slot, self.shape, self.dtype = key, slot, shape, dtype

    def tensor(self) -> Tensor:
        """Return the tensor, in the main process."""
        return _all[self.key].tensor(self)

    def pin_memory(self) -> Tensor:
        """Copy the tensor to pinned memory, which frees the slot; torch's loader calls this."""
        return self.tensor().pin_memory()


def _shaped(row: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return row[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
