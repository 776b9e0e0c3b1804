"""Which part of an encoder adapt.py trains: all of it, its last blocks, low-rank updates of its layers (LoRA), or both.

Shapes: D, E widths of a layer, R rank of its update.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from engine.signals import Stop

WAYS = ("all", "last", "lora", "explora")
LAYERS = ("attention", "all")


def train_part(encoder: Any, way: str, *, blocks: int, rank: int, layers: str, seed: int) -> str:
    """Freeze all of an encoder but the part that is trained, and put LoRA into its layers where it is asked for.

    LoRA (Hu et al., 2022) adds a trained product B A, (D, R) times (R, E), to the frozen weight (D, E) of a linear layer. B is
    0 at first, so that training starts from the encoder as it is. ``explora`` (Khanna et al., 2025, arXiv 2406.10973) trains
    the last blocks in full, and LoRA in all others. With the last blocks the final norm is trained, too.

    Args:
        encoder: a plain ViT of timm, changed in place. What needs no gradient stays so.
        way: one of `WAYS`.
        blocks: how many of the last blocks ``last`` and ``explora`` train in full.
        rank: R of ``lora`` and ``explora``.
        layers: linear layers with LoRA in each block: those of the ``attention``, or ``all``.
        seed: of the first values of A.

    Returns:
        A line on what is trained.

    Raises:
        Stop: if peft is missing, the encoder has fewer blocks, or LoRA would have no effect in it.
    """
    depth, whole = len(encoder.blocks), sum(parameter.numel() for parameter in encoder.parameters())
    if way in ("last", "explora") and blocks > depth - (way == "explora"):
        raise Stop(
            f"--train-blocks {blocks} must leave {'one' if way == 'explora' else 'none'} or more of {depth} blocks: use fewer"
        )
    first = {"all": 0, "lora": depth}.get(way, depth - blocks)  # from this block on, blocks are trained in full
    about = {"all": f"all {depth} blocks", "lora": ""}.get(way, f"the last {blocks} of {depth} blocks and the final norm")
    if way != "all":
        kept = (*(f"blocks.{i}." for i in range(first, depth)), *(("norm.", "fc_norm.") if first < depth else ()))
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name.startswith(kept))
    if way in ("lora", "explora"):
        names = [name for i in range(first) for name in _linear_layers(encoder.blocks[i], f"blocks.{i}", layers)]
        _add_lora(encoder, names, rank, seed)
        where = f"the first {first}" if about else f"all {first}"
        about += f"{' and ' if about else ''}LoRA of rank {rank} in {len(names)} layers of {where} blocks"
    trained = sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)
    return f"{about}, {trained / 1e6:.2f} M parameters for the {whole / 1e6:.2f} M of the encoder"


def _linear_layers(block: nn.Module, prefix: str, layers: str) -> Iterator[str]:
    """Yield the names of the linear layers of a block, or of its attention."""
    for name, module in block.named_modules(prefix=prefix):
        if isinstance(module, nn.Linear) and (layers == "all" or name.startswith(f"{prefix}.attn.")):
            yield name


def _add_lora(encoder: Any, names: list[str], rank: int, seed: int) -> None:
    """Put LoRA of scale 1 into layers; what else is trained stays so."""
    try:
        import peft
    except ImportError as error:
        raise Stop('--train lora and explora must have the package peft: pip install "mvmae[lora]"') from error
    if not names:
        raise Stop("LoRA must have linear layers to change, got none in the blocks of this encoder: use --train last")
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names), encoder)
    for parameter in trained:
        parameter.requires_grad_()
    for block in encoder.blocks:
        if getattr(block.attn, "q_bias", None) is not None and hasattr(block.attn, "qkv_bias_separate"):
            block.attn.qkv_bias_separate = True  # else timm's Eva takes the weight of qkv past its LoRA
    if passed := _passed_by(encoder, names):
        raise Stop(
            f"LoRA would have no effect in {', '.join(passed[:3])} of this encoder, past which timm computes: use --train last"
        )


@torch.no_grad()
def _passed_by(encoder: Any, names: list[str]) -> list[str]:
    """Return the layers that the encoder does not call, because it takes their weights only."""
    called: set[str] = set()
    hooks = [encoder.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name)) for name in names]
    weight = encoder.patch_embed.proj.weight
    size, mode = encoder.patch_embed.img_size, encoder.training
    encoder.eval().forward_features(weight.new_zeros(1, weight.shape[1], *size))
    encoder.train(mode)
    for hook in hooks:
        hook.remove()
    return [name for name in names if name not in called]
