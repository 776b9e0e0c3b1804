"""The optimizer of pretraining, and the schedule of the learning rate."""

from functools import partial
from typing import Any

import torch
from timm.optim import create_optimizer_v2, muon
from timm.scheduler import CosineLRScheduler

from engine.distributed import in_bf16

OPTIMIZERS = ("adamw", "muon")
NEWTON_SCHULZ = muon.zeropower_via_newtonschulz


def build_optimizer(
    trained: Any, name: str, *, lr: float, weight_decay: float, beta2: float, precision: str, device: torch.device
) -> torch.optim.Optimizer:
    """Build one of `OPTIMIZERS`, from timm.

    Muon (Jordan et al., 2024) makes the update of each matrix orthogonal; vectors are trained by AdamW. Updates are scaled to
    the size of AdamW's (Liu et al., 2025, arXiv 2502.16982), so that learning rates are of the same size for both. It computes
    in the precision of the run: timm's always takes bf16, which a processor without such instructions is many times slower in.
    That holds for every Muon of the process, whose latest one decides.

    Args:
        trained: model, or groups of parameters.
        name: one of `OPTIMIZERS`.
        lr: learning rate.
        weight_decay: of matrices, where ``trained`` is a model.
        beta2: decay of the squared gradients' mean in AdamW; that of the gradients' mean is 0.9.
        precision: of the training, as in `autocast`.
        device: of the parameters; AdamW runs as one fused kernel on CUDA.
    """
    options: dict[str, Any] = {"opt": name, "lr": lr, "weight_decay": weight_decay, "betas": (0.9, beta2)}
    if name == "muon":
        options["adjust_lr_fn"] = "match_rms_adamw"
        dtype = torch.bfloat16 if in_bf16(precision, device) else torch.float32
        muon.zeropower_via_newtonschulz = partial(NEWTON_SCHULZ, dtype=dtype)
    else:
        options["fused"] = device.type == "cuda"
    optimizer: torch.optim.Optimizer = create_optimizer_v2(trained, **options)
    return optimizer


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
