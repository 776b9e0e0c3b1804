"""Which encoder a run leaves: an average over its steps or a mix with the start, and the best one of its looks or the last."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.signals import Stop

Weights = dict[str, Tensor]
MEASURES = ("auto", "knn", "retrieval")
KEPT = ("step", "looked", "images", "found", "top")
"""What of a `Choice` a checkpoint holds beside its weights."""
NAMES = {"knn": "k-NN accuracy", "retrieval": "view retrieval"}


class Average:
    """An exponential moving average of an encoder's weights: a <- decay x a + (1 - decay) x w after each step, from the start.

    Of LoRA the factors are averaged, not their product.

    Args:
        weights: what is trained, by name.
        decay: 0 to 1, below 1; 1 / (1 - decay) is about the number of steps that count.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.trained, self.decay = weights, decay
        self.weights = copied(weights)

    @torch.no_grad()
    def update(self) -> None:
        """Count the weights as they are after a step."""
        for name, weight in self.trained.items():
            self.weights[name].lerp_(weight, 1 - self.decay)

    def state_dict(self) -> Weights:
        """Return the average."""
        return self.weights

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take it back."""
        for name, weight in self.weights.items():
            weight.copy_(state[name])


def copied(weights: Mapping[str, Tensor], device: str | None = None) -> Weights:
    """Copy weights, to another device where one is named."""
    return {name: weight.detach().to(device or weight.device, copy=True) for name, weight in weights.items()}


def interpolate(start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> Weights:
    """Compute (1 - share) x start + share x end (WiSE-FT; Wortsman et al., 2022): bit for bit the start at 0, the end at 1.

    LoRA's product is 0 at the start, and so only its factor B is scaled: what the layers compute is interpolated.
    """
    return {
        name: weight.clone() if ".lora_A." in name else torch.lerp(start[name].to(weight.device), weight, share)
        for name, weight in end.items()
    }


def score(found: Mapping[str, float], measure: str) -> float | None:
    """Return a number that is larger the better a look has found the features; None where it did not measure that."""
    value = found.get(resolve(found, measure))
    return None if value is None or not math.isfinite(value) else value


def resolve(found: Mapping[str, float], measure: str) -> str:
    """Return the name of a measure; for ``auto``, k-NN accuracy where a look has it, else view retrieval."""
    return ("knn" if "knn" in found else "retrieval") if measure == "auto" else measure


class Choice:
    """Follows what a run would leave: the encoder of the look that measured best, the start's too, or the last.

    View retrieval is near 100 % at the start where images are easily told apart, and only a clear fall is counted against an
    encoder: of those within a standard error of the best, at most 50 / sqrt(images) points, the latest is kept.

    Args:
        encoder: as it starts; what needs a gradient is followed.
        keep: ``best`` or ``last``.
        measure: one of `MEASURES`, by which the best is chosen.
        share: of the way from the start to the end of training, as in `interpolate`; 1: all of it.
        decay: of an `Average`, which takes the place of the weights as they are trained; 0: no average.
        images: number of images of a look: looks at others are not compared.

    Attributes:
        step: of the look that is kept; 0 is the start.
        found: what that look measured; empty where nothing was.
        top: the best score of all looks; minus infinity where none has one.
    """

    def __init__(
        self, encoder: nn.Module, *, keep: str, measure: str, share: float = 1.0, decay: float = 0.0, images: int = 0
    ) -> None:
        self.encoder, self.keep, self.measure, self.share, self.images = encoder, keep, measure, share, images
        self.trained: dict[str, Tensor] = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
        self.average = Average(self.trained, decay) if decay else None
        self.start = copied(self.trained, "cpu")
        self.best, self.step, self.looked = self.start, 0, 0
        self.found: dict[str, float] = {}
        self.top = -math.inf

    @property
    def plain(self) -> bool:
        """Whether what a look sees are the weights as they are trained."""
        return self.average is None and self.share == 1

    def candidate(self) -> Mapping[str, Tensor]:
        """Return the weights that a run would leave if this was its end and the last were kept."""
        end = self.average.weights if self.average else self.trained
        return end if self.share == 1 else interpolate(self.start, end, self.share)

    def chosen(self) -> Mapping[str, Tensor]:
        """Return the weights that a run leaves: those of the best look, or the last ones where none has measured anything."""
        return self.best if self.keep == "best" and self.found else self.candidate()

    @contextmanager
    def applied(self, weights: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Put weights, those of `candidate` where they are None, into the encoder for a while."""
        if weights is None and self.plain:
            yield
            return
        kept = copied(self.trained)
        self.apply(self.candidate() if weights is None else weights)
        try:
            yield
        finally:
            self.apply(kept)

    @torch.no_grad()
    def apply(self, weights: Mapping[str, Tensor]) -> None:
        """Put weights into the encoder."""
        for name, parameter in self.trained.items():
            parameter.copy_(weights[name])

    def consider(self, step: int, found: Mapping[str, float]) -> None:
        """Keep the candidate if a look at it has measured best so far; the last one if that is asked for.

        The look is within `applied`; this is after it, when the encoder has its trained weights back.

        Args:
            step: after which the look was.
            found: what it measured.
        """
        self.looked += score(found, self.measure) is not None
        if self._wins(found) or self.keep == "last":
            self.step, self.found = step, dict(found)
            self.best = copied(self.candidate(), "cpu") if self.keep == "best" and step else self.start

    @property
    def error(self) -> float:
        """The largest standard error of a share of the images of a look, in points."""
        return 50 / math.sqrt(self.images)

    def slack(self, found: Mapping[str, float]) -> float:
        """Return how far below the best a later look may be, in points."""
        return self.error if resolve(found, self.measure) == "retrieval" else 0.0

    def _wins(self, found: Mapping[str, float]) -> bool:
        """Tell whether a look is to be kept, and remember the best score."""
        top, new = self.top, score(found, self.measure)
        if new is None:
            return False
        self.top, slack = max(top, new), self.slack(found)
        return new > top or (slack > 0 and new >= top - slack)

    def restart(self, images: int, found: Mapping[str, float], kept: Mapping[str, float]) -> None:
        """Compare anew, after looks at another number of images.

        Args:
            images: how many.
            found: what a look at the start measured.
            kept: what a look at the best so far measured.
        """
        self.images, self.top = images, -math.inf
        self._wins(found)
        better = self._wins(kept)
        self.step, self.found = (self.step, dict(kept)) if better or self.keep == "last" else (0, dict(found))
        self.best = self.best if better else self.start

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from; ``weights`` are those that the run would leave now, none if as trained."""
        weights = {} if self.plain and self.keep == "last" else dict(self.chosen())
        return {name: getattr(self, name) for name in KEPT} | {"weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        for name in KEPT:
            setattr(self, name, state[name])
        self.found = dict(self.found)
        if self.keep == "best" and self.found:
            self.best = dict(state["weights"])

    def note(self, found: Mapping[str, float]) -> str:
        """Return a line on how the encoder will be chosen.

        Args:
            found: what the look at the start has measured.

        Raises:
            Stop: if it has not measured that by which the best is chosen.
        """
        if self.keep == "last" or not found:
            return "the encoder of the last step is kept" + ("" if self.keep == "last" else ", because none is measured")
        name = resolve(found, self.measure)
        if score(found, self.measure) is None:
            raise Stop(
                f"--keep-by {name} must be measured, and was not (no labels, or too few images?): choose another measure"
            )
        error = f"its standard error, at most {self.error:.1f} points"
        if name == "retrieval":
            return f"the latest encoder is kept whose {NAMES[name]} is as good as the best, within {error}; the start counts"
        return f"the encoder with the best {NAMES[name]} is kept, whatever {error}; the start counts"

    def lines(self, last: int) -> list[str]:
        """Return a line on what is kept, for the end of a run of ``last`` steps."""
        mixed = [f"averaged with decay {self.average.decay:g}"] if self.average else []
        mixed += [f"{self.share:g} of the way from the start"] if self.share != 1 else []
        how = f" ({', '.join(mixed)})" if mixed else ""
        value = self.found.get(resolve(self.found, self.measure))
        if self.keep == "last" or value is None:
            return [f"encoder/ holds the encoder after step {last}{how}"] if how else []
        name, slack = NAMES[resolve(self.found, self.measure)], self.slack(self.found)
        if self.step == 0:
            beaten = f"no look of {self.looked} was {'as good as' if slack else 'better than'} the start"
            return [f"{beaten} ({name} {value:.2f}): encoder/ holds the start, unchanged"]
        which = f"the latest within {slack:.1f} points of the best" if slack else "the best"
        return [f"encoder/ holds {which} of {self.looked} looks, after step {self.step} of {last} ({name} {value:.2f}){how}"]
