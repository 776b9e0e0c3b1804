"""The optimizer and its learning rate, a pure function of the step."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from timm.optim import create_optimizer_v2, muon

from engine.distributed import in_bf16

OPTIMIZERS = ("adamw", "muon")
NEWTON_SCHULZ = muon.zeropower_via_newtonschulz
BETAS = 0.9, 0.95


def build_optimizer(
    groups: Iterable[dict[str, Any]], name: str, *, lr: float, precision: str, device: torch.device
) -> torch.optim.Optimizer:
    """Build one of `OPTIMIZERS` with betas (0.9, 0.95) (paper, Section 4.1.1; MAE).

    Muon (Jordan et al., 2024) makes the update of each matrix orthogonal; vectors are trained by AdamW. Updates are scaled to
    the size of AdamW's (Liu et al., 2025, arXiv 2502.16982), so that learning rates are of the same size for both. It computes
    in the ``precision`` of the training, as in `autocast`; AdamW runs as one fused kernel on CUDA.
    """
    options: dict[str, Any] = {"opt": name, "lr": lr, "betas": BETAS}
    if name == "muon":
        options["adjust_lr_fn"] = "match_rms_adamw"
        # timm's Muon always computes in bf16, which is many times slower on a processor without such instructions
        dtype = torch.bfloat16 if in_bf16(precision, device) else torch.float32
        muon.zeropower_via_newtonschulz = partial(NEWTON_SCHULZ, dtype=dtype)
    else:
        options["fused"] = device.type == "cuda"
    optimizer: torch.optim.Optimizer = create_optimizer_v2(list(groups), **options)
    return optimizer


def cosine(step: int, steps: int, warmup: int, end: float = 0.0) -> float:
    """Return the learning rate of a step, counted from 1, as a share of its peak: warm-up from 0, then a cosine to ``end``."""
    done, warmup = step - 1, min(warmup, steps - 1)
    if done < warmup:
        return done / warmup
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(steps - warmup, 2)))


def warmup_steps(config: Any, steps: int, per_epoch: int) -> int:
    """Return the steps of warm-up: ``config.warmup_epochs`` where they are given, else the share ``config.warmup`` of all."""
    given: float | None = config.warmup_epochs
    return round(float(config.warmup * steps if given is None else given * per_epoch))


def describe_warmup(warmup: int, steps: int) -> str:
    """Return words about the warm-up of a run, with a warning where it leaves little of the run at its learning rate."""
    long = f"; warning: that is more than a quarter of {steps} steps: lower --warmup-epochs" if warmup > steps / 4 else ""
    return f"warm-up of {warmup} steps{long}"


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, lr_encoder: float | None = None) -> None:
    """Give each group the learning rate, or that of groups marked ``encoder``, times its own factor, ``lr_scale``."""
    for group in optimizer.param_groups:
        rate = lr_encoder if lr_encoder is not None and group["encoder"] else lr
        group["lr"] = rate * group.get("lr_scale", 1.0)
