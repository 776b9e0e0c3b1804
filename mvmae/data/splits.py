"""Which names of folders, archives or paths stand for the splits of a data set."""

import re
from collections.abc import Iterable
from pathlib import Path

SPLITS = {
    "train": ("train", "training", "train_set", "trainset"),
    "val": ("val", "valid", "validation", "eval", "dev"),
    "test": ("test", "testing", "test_set", "testset"),
}
"""Names of splits, in upper or lower case: of folders, of the first folder in a list, and words in the names of archives."""


class SplitError(ValueError):
    """The data can be read but has no such split."""


def split_of(name: str) -> str:
    """Return the split, of `SPLITS`, that a whole name stands for; empty if none."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), "")


def split_words(name: str) -> list[str]:
    """Return the words of a name, in lower case, that stand for splits."""
    return [word for word in re.findall("[a-z]+", name.lower()) if split_of(word)]


def find_splits(names: Iterable[str], split: str, place: Path) -> dict[str, str]:
    """Return which of the names stand for `train` and `val`; empty if there are no splits.

    Without a validation split, the test split validates.

    Raises:
        SplitError: There is no validation split, and `val` is asked for.
        ValueError: Two names for one split, or what may be a split or something else.
    """
    splits = _find_splits(sorted(set(names)), place)
    if split != "train" and split not in splits:
        raise SplitError(f"{place} has no {split} split: no folder, archive or path in it is named train, and val or test")
    return splits


def describe_splits(splits: dict[str, str]) -> str:
    """Return a line on what was taken for which split, unless it is what they are called here."""
    if all(split == name for split, name in splits.items()):
        return ""
    return ", ".join(f"{'validation' if split == 'val' else split} = {name}" for split, name in splits.items())


def _find_splits(names: list[str], place: Path) -> dict[str, str]:
    found = {split: [name for name in names if split_of(name) == split] for split in SPLITS}
    others = [name for name in names if not split_of(name)]
    if twice := next((same for same in found.values() if len(same) > 1), []):
        raise ValueError(f"{place} has two names for one split, {' and '.join(twice)}: rename or move one of them")
    train, val = found["train"], found["val"] or found["test"]
    if train and val:
        return {"train": train[0], "val": val[0]}
    cure = "give the splits the names train and val, or name the one that is meant"
    if (train or val) and others:
        known = (train + val)[0]
        raise ValueError(f"{place} holds {known} beside {others[0]}, so that {known} may be a split or a class: {cure}")
    if val:
        raise ValueError(f"{place} holds {val[0]} and no training split: name {place / val[0]} itself, or {cure}")
    kinds: dict[str, dict[str, str]] = {}  # what stays of a name without the split's -> split -> name
    for name in others:
        for word in split_words(name):
            kinds.setdefault(name.lower().replace(word, "", 1), {})[split_of(word)] = name
    for pair in kinds.values():
        if "train" in pair and len(pair) > 1:
            raise ValueError(f"{place} holds {' and '.join(pair.values())}, which may be splits or classes: {cure}")
    return {"train": train[0]} if train else {}
