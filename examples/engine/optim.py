"""The schedule of the learning rate."""

import torch
from timm.scheduler import CosineLRScheduler


def cosine_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup_steps: int, min_lr: float = 0.0) -> CosineLRScheduler:
    """Build timm's schedule, a pure function of the step: linear warm-up from 0, then a cosine to ``min_lr`` at ``steps``."""
    warmup_steps = min(warmup_steps, steps - 1)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(steps - warmup_steps, 2),
        lr_min=min_lr,
        warmup_t=warmup_steps,
        warmup_prefix=True,
        t_in_epochs=False,
    )
