"""The images of all scripts in two splits: what is trained on, and what is held out, the same in all of them."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.signals import Stop
from mvmae.data import ImageLike, ImageSource, SplitError, open_images

HELD_OUT = 10  # one in 10 images is held out of data without a validation split


class Part(ImageSource):
    """Some images of a source.

    Args:
        source: the images.
        indices: which of them, in the order that they have here.
        numbers: new number of each of the source's classes; where None, classes and their names stay.
        names: of the classes by their new numbers.
    """

    def __init__(
        self, source: ImageSource, indices: Tensor, numbers: Tensor | None = None, names: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.source, self.indices, self.problems, self.splits = source, indices, source.problems, source.splits
        self.class_names = source.class_names if numbers is None else names
        if source.labels is not None:
            labels = torch.as_tensor(source.labels)[indices]
            self.labels = (labels if numbers is None else numbers[labels]).numpy()

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> ImageLike:
        return self.source.image(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the source, with the number of images and their places."""
        return f"{self.source.fingerprint}:{len(self)}:{int(self.indices.sum())}"


class Joined(ImageSource):
    """The images of several sources, one source after the other, without labels."""

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        super().__init__()
        self.sources = sources
        self.ends = list(accumulate(map(len, sources)))
        self.problems = tuple(problem for source in sources for problem in source.problems)

    def __len__(self) -> int:
        return self.ends[-1]

    def _place(self, index: int) -> tuple[ImageSource, int]:
        number = bisect_right(self.ends, index)
        return self.sources[number], index - (self.ends[number] - len(self.sources[number]))

    def image(self, index: int) -> ImageLike:
        source, place = self._place(index)
        return source.image(place)

    def name(self, index: int) -> str:
        source, place = self._place(index)
        return source.name(place)

    @property
    def fingerprint(self) -> str:
        return "+".join(source.fingerprint for source in self.sources)


class Splits(NamedTuple):
    """Images to train on, held-out images if there are any, and a note on them for the log."""

    train: ImageSource
    val: ImageSource | None
    note: str


class Labelled(NamedTuple):
    """Training and validation images of the same classes, and a note on them for the log."""

    train: Part
    val: Part
    class_names: tuple[str, ...]
    note: str


def named_images(data: str, split: str = "train", option: str = "--data") -> ImageSource:
    """Open the images of an option, which an error names."""
    try:
        return open_images(data, split=split)
    except SplitError:
        raise
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


KINDS = "tar, Parquet or Arrow files, a data set that timm can open, or sample: photographs of scikit-image"
"""What --data takes in every script that trains, measures or draws, besides folders and lists."""


def open_splits(data: str, option: str = "--data") -> Splits:
    """Open images to train on, and those held out: the validation split of the data, with the same numbers of classes.

    Where it has none, one image of ten of each class is held out, the same ones in all scripts; nothing without labels.
    """
    train = named_images(data, option=option)
    try:
        val = named_images(data, "val", option)
        val, lacking = match_classes(train, val)
        return Splits(train, val, "; ".join(filter(None, ["the data's validation split", val.splits, lacking])))
    except SplitError:
        labels = torch.empty(0) if train.labels is None else torch.as_tensor(train.labels)
    rest, held = (part.sort().values for part in hold_out(labels))
    if not len(held):
        return Splits(train, None, "no validation split and no classes: no image is held out")
    note = "no validation split: one image of ten of each class is held out, the same in all scripts"
    return Splits(Part(train, rest), Part(train, held), note)


def match_classes(train: ImageSource, val: ImageSource) -> tuple[ImageSource, str]:
    """Return validation images whose classes have training's numbers, by their names, and a note on those that they lack."""
    if train.labels is None or val.labels is None:
        return val, ""
    taught = [train.class_names[i] for i in np.unique(train.labels)]
    tested = [val.class_names[i] for i in np.unique(val.labels)]
    if unknown := [name for name in tested if name not in set(taught)]:
        raise Stop(f"validation must have classes of training, got {shown(unknown)} too: rename or remove what is wrong")
    lacking = [name for name in taught if name not in set(tested)]
    note = f"validation lacks {len(lacking)} of {len(taught)} classes ({shown(lacking)})" if lacking else ""
    if val.class_names == train.class_names:
        return val, note
    number = {name: i for i, name in enumerate(train.class_names)}
    numbers = torch.tensor([number.get(name, -1) for name in val.class_names])
    return Part(val, torch.arange(len(val)), numbers, train.class_names), note


def shown(names: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def open_labelled(data: str, *, train_images: int = 0, val_images: int = 0) -> Labelled:
    """Open labelled images of two or more classes; held out as in `open_splits`.

    Args:
        data: what `open_images` takes.
        train_images: most images to train on, drawn once, the same whatever the seed; all where 0.
        val_images: most images to validate on, likewise.
    """
    train, val, note = open_splits(data)
    if train.labels is None:
        raise Stop(f"{data} must have labels, got none: use a folder for each class, or another labelled data set")
    if val is None:
        raise Stop(f"{data} must have two or more classes and images of each, got a single one: add some")
    if val.labels is None:
        raise Stop(f"the validation split of {data} must have labels, got none: use a folder for each class")
    classes = torch.as_tensor(train.labels).unique()  # a class may have a name and no image
    if len(classes) < 2:
        raise Stop(f"{data} must have two or more classes, got one: add images of another")
    names = tuple(train.class_names[i] for i in classes.tolist())
    numbers = torch.full((len(train.class_names),), -1).index_copy(0, classes, torch.arange(len(classes)))
    first, second = (
        Part(part, draw(len(part), limit).sort().values, numbers, names)
        for part, limit in ((train, train_images), (val, val_images))
    )
    note = f"trained on {len(first)} images, tested on {len(second)}, of {len(names)} classes ({note})"
    return Labelled(first, second, names, "; ".join(dict.fromkeys([note, *train.problems, *val.problems])))


def hold_out(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Split labelled images: of those of each class, in an order that never changes, every tenth is held out.

    A tenth in all, of a class of ten or more at least one, and always fewer than a class has. None where there is one class.
    """
    order = draw(len(labels))
    classes, places, counts = labels.unique(return_inverse=True, return_counts=True)
    order = order[places[order].argsort(stable=True)]
    held = order[counts[places[order]] > 1][::HELD_OUT] if len(classes) > 1 else order[:0]
    return order[~torch.isin(order, held)], held


def draw(length: int, limit: int = 0) -> Tensor:
    """Draw at most ``limit`` images, all if it is 0: always the same ones, a subset of those of a larger limit."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(0))[: limit or None]
