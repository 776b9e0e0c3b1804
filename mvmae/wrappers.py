"""What torch.compile, data parallelism, FSDP and the meta device need from a model."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside what ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` put around it."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def plain_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights by their names without the prefixes of torch's wrappers."""
    return {
        re.sub(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", name): value
        for name, value in weights.items()
    }


def as_forward(module: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Run a function as a module's forward, because FSDP gathers the weights of a module only for its forward."""
    if not hasattr(module, "unshard"):  # which FSDP's fully_shard adds
        return function(*args)
    if not hasattr(module, "run"):
        from torch.distributed.fsdp import register_fsdp_forward_method

        module.run = lambda function, *args: function(*args)
        register_fsdp_forward_method(module, "run")
    return module.run(function, *args)


def restore_buffers(model: nn.Module, _: Any) -> None:
    """Compute buffers that no checkpoint holds: they are undefined after ``to_empty``, and meta after ``assign=True``."""
    device = next(model.parameters()).device
    for module in model.modules():
        if fill := getattr(module, "init_non_persistent_buffers", None):
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:
                    setattr(module, name, torch.empty_like(buffer, device=device))
            fill()
