"""What torch.compile, data parallelism, FSDP, the meta device and the adapters of peft need from a model."""

import copy
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


def without_peft(model: nn.Module) -> nn.Module:
    """Return the model inside a ``PeftModel``, its adapters still in it; any other model as it is.

    Raises:
        TypeError: if the ``PeftModel`` adds to the input of its model rather than to its layers.
    """
    if not (type(model).__name__.startswith("Peft") and hasattr(model, "base_model")):
        return model
    inner: Any = getattr(model.base_model, "model", None)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False) or not isinstance(inner, nn.Module):
        raise TypeError(
            f"the adapters in {type(model).__name__} must be within the layers of the model, got prompts: use LoRA or the like"
        )
    return inner


def merged(model: nn.Module) -> nn.Module:
    """Return a model without adapters of peft (LoRA and the like) whose weights hold what its active adapters add.

    Args:
        model: any, in a ``PeftModel`` or not.

    Returns:
        The model itself where it has no adapters. Else a copy: the adapters of the model itself stay as they are.
    """
    model = without_peft(model)
    if not any(map(_is_adapted, model.modules())):
        return model
    model = copy.deepcopy(model)
    names = [name for name, module in model.named_modules() if _is_adapted(module)]
    for name in (name for name in names if not any(name.startswith(f"{other}.") for other in names)):
        module: Any = model.get_submodule(name)
        if hasattr(module, "unload_and_optionally_merge_module"):
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            if not (module.merged or module.disable_adapters):
                module.merge()
            plain = module.get_base_layer()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    return model


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "get_base_layer") or hasattr(module, "unload_and_optionally_merge_module")


def merged_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of `merged` from that of a model with LoRA of scale 1 (``lora_alpha`` equal to ``r``).

    Args:
        weights: where a layer has LoRA, ``base_layer.weight`` (D, E), ``lora_A.default.weight`` (R, E) and
            ``lora_B.default.weight`` (D, R) stand for its ``weight``.
    """
    plain = {name.replace(".base_layer.", "."): value for name, value in weights.items() if ".lora_" not in name}
    for name, up in weights.items():
        if name.endswith(".lora_B.default.weight"):
            layer = name.removesuffix(".lora_B.default.weight")
            plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + up @ weights[f"{layer}.lora_A.default.weight"]
    return plain


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
