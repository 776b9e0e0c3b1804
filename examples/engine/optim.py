"""The optimizer of pretraining, and the schedule of the learning rate."""

from typing import Any

import torch
from timm.scheduler import CosineLRScheduler

OPTIMIZERS = ("adamw", "muon")


def optimizer_options(optimizer: str, beta2: float, device: torch.device) -> dict[str, Any]:
    """Return timm's arguments for one of `OPTIMIZERS`.

    Muon (Jordan et al., 2024) makes the update of each matrix orthogonal; vectors are trained by AdamW. Updates are scaled to
    the size of AdamW's (Liu et al., 2025, arXiv 2502.16982), so that learning rates are of the same size for both.

    Args:
        optimizer: one of `OPTIMIZERS`.
        beta2: decay of the squared gradients' mean in AdamW; that of the gradients' mean is 0.9.
        device: of the parameters; AdamW runs as one fused kernel on CUDA.
    """
    options: dict[str, Any] = {"opt": optimizer, "betas": (0.9, beta2)}
    if optimizer == "muon":
        return options | {"adjust_lr_fn": "match_rms_adamw"}
    return options | {"fused": device.type == "cuda"}


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
