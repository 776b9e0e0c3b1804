"""How a pretraining run is doing, by name, from the lines of its log: rules with bands that were measured.

Each rule looks at the newest lines and returns a `Verdict` or None. `judge` asks them in the order of what to mend first:

  collapse               all images have nearly the same feature
  contrast not falling   the contrastive loss is where it is for features that tell no two images apart
  plateau                no loss falls by more than its noise
  starved by data        steps wait for data most of the time
  learning               none of these

How the bands were measured stands in examples/README.md ("Following a run").
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mvmae.metrics import COLLAPSED_RANK

ENOUGH = 6
"""Lines of the log with a loss below which there is no verdict on losses."""
NEWEST = 1 / 2
"""Share of these lines, the newest ones, over which a loss has to fall."""
NOISE = 2.4
"""Standard errors that the slope of a line through them must exceed: at most 1.3 at learning rate 0, else 2.5 and more."""
LEAST = 0.005
"""Share of a loss by which it must fall as well, since in a long run any fall exceeds the noise; the least seen was 0.016."""
LOST_RANK = 1 / 3
"""Share of the effective rank at the first look below which the features have collapsed: 0.06 to 0.26, others 0.44 and more."""
NO_CONTRAST = 0.98
"""Share of ln(N - 1), the contrastive loss of N equal features: 0.9999 at temperature 1000, 0.85 at learning rate 0."""
ENDED = 0.05
"""Share of the largest learning rate so far below which the schedule has ended."""
STARVED = 0.5
"""Share of the time spent waiting for data: 0.87 to 0.89 with a slow transform, at most 0.34 without."""

Records = Sequence[Mapping[str, Any]]


class Verdict(NamedTuple):
    """A verdict's name, what it rests on, and what to do."""

    name: str
    why: str
    cure: str

    def __str__(self) -> str:
        return f"{self.name} ({self.why}): {self.cure}"


def judge(records: Records, *, crops: int, loss_weight: float) -> Verdict | None:
    """Return the verdict on a run; None while there is too little to judge by.

    Args:
        records: lines of ``log.jsonl``, oldest first.
        crops: number of crops N that the contrastive loss compares, images of a batch times views.
        loss_weight: weight of the contrastive loss; 0: it is not trained, and not judged.
    """
    contrast = bool(loss_weight) and any(record.get("loss_con") for record in records)
    if contrast:  # lines before the contrastive loss was added tell nothing of how both fall
        records = [record for record in records if record.get("loss_con") or "loss" not in record]
    found = collapse(records) or (contrast_not_falling(records, crops) if contrast else None)
    found = found or plateau(records, contrast=contrast) or starved(records)
    return found or learning(records, contrast=contrast)


def collapse(records: Records) -> Verdict | None:
    """Judge the newest effective rank, by itself and against that of the first look."""
    ranks = [record["effective_rank"] for record in records if "effective_rank" in record]
    if not ranks or ranks[-1] >= max(COLLAPSED_RANK, LOST_RANK * ranks[0]):
        return None
    why = f"the effective rank of the features is {ranks[-1]:.1f}; it was {ranks[0]:.1f} at the first look"
    return Verdict("collapse", why, "lower --base-lr, or --loss-weight; make sure that the images are not all alike")


def contrast_not_falling(records: Records, crops: int) -> Verdict | None:
    """Judge the newest contrastive losses against that of features which are all the same."""
    values, worst = newest(records, "loss_con"), math.log(max(crops - 1, 2))
    if not values or mean(values) < NO_CONTRAST * worst:
        return None
    why = f"loss_con {mean(values):.3f} is that of features which tell nothing apart, ln({crops} - 1) = {worst:.3f}"
    cure = "set --temperature to 0.07; if it is, lower --base-lr, or let crops share more: --crop-scale 0.4 1.0"
    return Verdict("contrast not falling", why, cure)


def plateau(records: Records, *, contrast: bool = True) -> Verdict | None:
    """Judge whether any loss still falls; where the learning rate is near 0 again, none can."""
    falls = {name: fall for name in names(contrast) if (fall := fall_of(newest(records, name))) is not None}
    if not falls or any(fell for _, fell in falls.values()):
        return None
    why = ", ".join(f"{name} {-share:+.1%}" for name, (share, _) in falls.items())
    why = f"over the newest half of the log: {why}, within the noise"
    rates = [record["lr"] for record in records if "lr" in record]
    if rates and rates[-1] < ENDED * max(rates):
        return Verdict("plateau", why, "the schedule has ended; more --epochs, in a new run, may go further")
    return Verdict("plateau", why, "raise --base-lr if it is far from the default; else the run is done: measure its features")


def starved(records: Records) -> Verdict | None:
    """Judge the time that steps wait for data."""
    values = sorted(newest(records, "waiting"))
    if not values or values[len(values) // 2] <= STARVED:
        return None
    why = f"steps wait for data {values[len(values) // 2]:.0%} of the time"
    return Verdict("starved by data", why, "more --workers, smaller image files, or a cheaper --transform")


def learning(records: Records, *, contrast: bool = True) -> Verdict | None:
    """Say which losses fall."""
    falls = {name: fall for name in names(contrast) if (fall := fall_of(newest(records, name))) is not None}
    if not falls:
        return None
    why = ", ".join(f"{name} {-share:+.1%}" for name, (share, fell) in falls.items() if fell)
    return Verdict("learning", f"over the newest half of the log: {why}", "let it run")


def names(contrast: bool) -> tuple[str, ...]:
    """Return the losses to judge."""
    return ("loss_rec", "loss_con") if contrast else ("loss_rec",)


def newest(records: Records, name: str) -> list[float]:
    """Return the newest values of a number of the log, oldest first; none where there are too few."""
    values = [float(record[name]) for record in records if name in record and "loss" in record]
    return values[-max(math.ceil(NEWEST * len(values)), ENOUGH) :] if len(values) >= ENOUGH else []


def fall_of(values: Sequence[float]) -> tuple[float, bool] | None:
    """Fit a line to values; return by which share it falls from end to end, and whether that is more than their noise."""
    if len(values) < ENOUGH:
        return None
    count, centre, middle = len(values), mean(values), (len(values) - 1) / 2
    spread = sum((i - middle) ** 2 for i in range(count))
    slope = sum((i - middle) * value for i, value in enumerate(values)) / spread
    rest = sum((value - centre - slope * (i - middle)) ** 2 for i, value in enumerate(values))
    error = math.sqrt(rest / (count - 2) / spread)
    share = -slope * (count - 1) / (abs(centre - slope * middle) or 1.0)
    return share, -slope > NOISE * error and share > LEAST


def mean(values: Sequence[float]) -> float:
    """Return the mean of values."""
    return sum(values) / len(values)
