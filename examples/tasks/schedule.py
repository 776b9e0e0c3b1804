"""Length, batch and stages of a run of pretrain.py or adapt.py: given, chosen from the images, or fitted to a time."""

import copy
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from engine.distributed import Ranks
from engine.optim import cosine, describe_warmup, warmup_steps
from engine.signals import Stop
from mvmae.data import Batch
from tasks.config import Config
from tasks.evaluation import Evaluation

IMAGES_PER_MINUTE = 6000  # of two CPU cores: a first guess of how many images --minutes can pass
STEPS_PER_IMAGE = 30  # of a batch, measured: RESULTS.md, "Short runs"
EPOCHS, IMAGES = 44, 50_000
"""Epochs of two views for that many images: an hour and a half of two CPU cores at the 400 images/s of ``--preset small``."""


class Schedule(NamedTuple):
    """The length of a run and of its stages, all in steps, and the images of a step over all ranks.

    Attributes:
        batch_size: images of a step.
        lr: peak of the learning rate.
        steps: of the whole run.
        warmup: steps in which the learning rate rises.
        frozen: steps in which the encoder stays as it is; its rate then rises for as long (LP-FT).
        contrast_after: steps before the contrastive loss is added.
        eval_every: steps between two evaluations; 0: only before and after.
        per_epoch: steps of a pass over the images.
    """

    batch_size: int
    lr: float
    steps: int
    warmup: int
    frozen: int
    contrast_after: int
    eval_every: int
    per_epoch: int

    def learning_rates(self, step: int) -> dict[str, float]:
        """Return the rate ``lr`` of a step, and ``lr_encoder``, the encoder's, where the encoder is frozen at first.

        A random decoder's gradients would undo in a few steps what an encoder has learned (LP-FT; Kumar et al., 2022).
        """
        lr = self.lr * cosine(step, self.steps, self.warmup)
        share = min(max(step - self.frozen, 0) / (self.frozen + 1), 1.0)
        return {"lr": lr, "lr_encoder": lr * share} if self.frozen else {"lr": lr}


def choose_batch(number: int, length: float) -> int:
    """Return the batch for a run that passes ``length`` images, of ``number`` different ones, 0 where that is not known.

    It is a power of two from 16 to 256. A short run needs steps more than negatives: about 30 for each image of its batch. So
    does a small set: at most a 16th.
    """
    most = min(max(int(math.log2(max(number / 16, 1))), 4), 8) if number else 8
    return int(2 ** min(max(round(math.log2(max(length / STEPS_PER_IMAGE, 1)) / 2), 4), most))


def fit_schedule(config: Config, number: int, ranks: Ranks, steps: int = 0, batch: int = 0) -> Schedule:
    """Return the length of a run on ``number`` images, 0 where it is not known; what is not given is chosen from that number.

    ``steps`` and ``batch`` are what `fit_minutes` has found; without them, epochs or steps are the length.

    Batch: that of `choose_batch`, of which ``lr_batch`` 0 says that --base-lr is for it. Epochs: as the inverse square root of
    the number, so that a larger set is passed fewer times, though more images are seen in all; twice as many with one view
    instead of two.
    """
    steps, known = steps or config.steps, number
    if not number:
        if not steps and not config.minutes:
            raise Stop(f"--data {config.data} has a length that is not known: add --steps N or --minutes N")
        number = max(steps, 1) * (config.batch_size or 256)  # one epoch
    epochs = config.epochs or max(round(EPOCHS * (IMAGES / number) ** 0.5 * 2 / config.num_views), 1)
    passed = steps**2 / STEPS_PER_IMAGE if steps else IMAGES_PER_MINUTE * config.minutes or epochs * number
    chosen = batch or choose_batch(known, passed)
    batch, multiple = config.batch_size or chosen, ranks.world_size * config.accumulate
    if batch > number >= multiple:
        batch = number // multiple * multiple
    lr = config.base_lr * batch / (config.lr_batch or chosen)
    if config.loss_weight and batch < 2:
        raise Stop(f"--batch-size {batch} leaves the contrastive loss no negatives: use more, or --loss-weight 0")
    per_epoch = max(number // batch, 1)
    steps = steps or max(round(epochs * per_epoch), 1)
    warmup = warmup_steps(config, steps, per_epoch)
    every = round(0.1 * steps if config.eval_every is None else config.eval_every * per_epoch)
    frozen, late = round(config.freeze * steps), round(config.contrast_from * steps) if config.loss_weight else 0
    return Schedule(batch, lr, steps, warmup, frozen, late, every, per_epoch)


def fit_minutes(
    config: Config,
    number: int,
    schedule: Schedule,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    backward: Callable[[int, Batch], Any],
    load: Callable[[Schedule], Iterable[Batch]],
    evaluation: Evaluation,
    ranks: Ranks,
    begun: float | None = None,
) -> Schedule:
    """Return the schedule that fits into ``--minutes`` from now on, by the time of the first steps and of an evaluation.

    These steps are then undone; where they suit another batch, steps of that batch are timed in their place, once. Evaluations
    on the way take at most a quarter of the time. All ranks must call it, and get the same; a `Stop` where no step fits.
    """
    fresh, marks = copy.deepcopy((model.state_dict(), optimizer.state_dict())), [time.monotonic()]
    for step, batch in enumerate(load(schedule), 1):
        backward(step, batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.monotonic())
        if ranks.any(step >= 3 and marks[-1] - marks[0] > 6 * config.minutes):  # a tenth of the time
            break
    model.load_state_dict(fresh[0])
    optimizer.load_state_dict(fresh[1])
    half = (len(marks) - 1) // 2  # the first ones start workers, compile, and find batches that are loaded already
    seconds = (marks[-1] - marks[half]) / (len(marks) - 1 - half)
    evaluation()
    once = time.monotonic() - marks[-1]
    fixed = 2 + (4 if config.pretrained else 0)  # before and after, and adapt.py's table of gains
    between = min(int(15 * config.minutes / once), 9) if config.eval_every is None else 0
    between = min(ranks.gather(between))
    if config.eval_every is not None and schedule.eval_every:
        seconds += once / schedule.eval_every
    spent = time.monotonic() - (marks[0] if begun is None else begun) + (fixed + between) * once
    steps = min(ranks.gather(int((60 * config.minutes - spent) / seconds)))
    if steps < 1:
        cost = f"{fixed + between} evaluations take {(fixed + between) * once:.0f} s and a step {seconds:.2g} s"
        enough = math.ceil((spent + 20 * seconds) / 60)
        raise Stop(f"--minutes {config.minutes:g} is too short: {cost}; use --minutes {enough}, or fewer --eval-images")
    chosen = choose_batch(number, steps * schedule.batch_size)
    if begun is None and not config.batch_size and chosen != schedule.batch_size:
        schedule = fit_schedule(config, number, ranks, steps, chosen)
        return fit_minutes(config, number, schedule, model, optimizer, backward, load, evaluation, ranks, marks[0])
    found = fit_schedule(config, number, ranks, steps, schedule.batch_size)
    every = found.eval_every if config.eval_every is not None else round(steps / (between + 1)) if between else 0
    return found._replace(eval_every=every)


def describe_schedule(schedule: Schedule, config: Config) -> str:
    """Return a line on the schedule of a run: all that was given or chosen."""
    epochs = schedule.steps / schedule.per_epoch
    parts = [
        f"{schedule.steps} steps of {schedule.batch_size} images ({epochs:g} epochs), peak learning rate {schedule.lr:.3g}"
    ]
    parts += [f"as many as fit into {config.minutes:g} minutes"] if config.minutes else []
    parts += [describe_warmup(schedule.warmup, schedule.steps)]
    parts += [f"encoder frozen for {schedule.frozen}"] if schedule.frozen else []
    late = "contrast and jitter" if any(config.jitter) or config.grayscale else "contrast"
    parts += [f"{late} from step {schedule.contrast_after + 1}"] if schedule.contrast_after else []
    if config.batch_size > schedule.batch_size:
        parts.append(f"batch and rate cut from --batch-size {config.batch_size}, which is more than there are images")
    return "; ".join(parts)
