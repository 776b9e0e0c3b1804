"""The projection head before Eq. 4 (the paper has none), and how a file describes one.

Shapes: N rows of this process, D width of a row.
"""

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .gradients import num_processes, sum_over_processes
from .weights import WeightsError, building, check_sizes


class BatchNorm(nn.Module):
    """Batch normalisation over the rows of all processes, in float32 at least, for a module that is used in training alone.

    Unlike torch's `BatchNorm1d` it keeps no running statistics: a batch is normalised by its own, in evaluation too, where each
    process has its own batch. Unlike torch's `SyncBatchNorm` it works on a CPU. In training, all processes must have the same
    number of rows.

    Args:
        dim: width D.
        eps: added to the variance.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scale to 1 and the shift to 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise rows, (N, D), to mean 0 and variance 1 in each column, then scale and shift them."""
        with torch.autocast(x.device.type, enabled=False):
            x = x if x.dtype == torch.float64 else x.float()
            total = sum_over_processes if self.training else torch.Tensor.clone  # one process alone may evaluate
            count = len(x) * (num_processes() if self.training else 1)
            centred = x - total(x.sum(dim=0)) / count
            variance = total(centred.square().sum(dim=0)) / count
            return centred * (variance + self.eps).rsqrt() * self.weight + self.bias

    def extra_repr(self) -> str:
        """Return the arguments, for ``repr``."""
        return f"{self.dim}, eps={self.eps}"


LAYERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
    BatchNorm: ("dim", "eps"),
    nn.BatchNorm1d: ("num_features", "eps", "momentum", "affine", "track_running_stats"),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine"),
    nn.Dropout: ("p",),
    nn.GELU: ("approximate",),
    nn.Identity: (),
    nn.ReLU: (),
    nn.SiLU: (),
    nn.Tanh: (),
}  # layers that a file can describe, and their arguments, each an attribute of the layer

_logger = logging.getLogger(__name__)


def projection_mlp(
    in_dim: int, hidden_dim: int = 2048, out_dim: int = 256, *, depth: int = 2, batch_norm: bool = False
) -> nn.Sequential:
    """Build a projection head: linear layers, with a ReLU between two of them. The paper has none.

    The default is SimCLR's (Chen et al., 2020). With ``batch_norm``, each but the last is normalised by `BatchNorm` before
    its ReLU, as in MoCo v3 (Chen et al., 2021), and no layer has a bias of its own.

    Args:
        in_dim: width D of the encoder.
        hidden_dim: width between the layers.
        out_dim: width of the vectors that are compared.
        depth: number of linear layers, at least 1.
        batch_norm: whether to normalise each hidden layer over the batch of all processes.
    """
    if depth < 1:
        raise ValueError(f"depth of a projection head must be at least 1 layer, got {depth}")
    return _mlp([in_dim, *[hidden_dim] * (depth - 1), out_dim], batch_norm=batch_norm)


def _mlp(widths: Sequence[int], *, batch_norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for in_dim, out_dim in pairwise(widths):
        layers += [nn.Linear(in_dim, out_dim, bias=not batch_norm)]
        layers += [BatchNorm(out_dim), nn.ReLU()] if batch_norm else [nn.ReLU()]
    return nn.Sequential(*layers[: -2 if batch_norm else -1])


def describe_projector(projector: nn.Module) -> list[Any] | str | None:
    """Return what rebuilds a projector, in types that JSON can hold: its layers, or None where there is none.

    Where that is not enough, return the name of its class and log a warning.
    """
    if isinstance(projector, nn.Identity):
        return None
    described = [
        {"layer": type(layer).__name__, **{name: getattr(layer, name) for name in LAYERS.get(type(layer), ())}}
        | ({"bias": layer.bias is not None} if isinstance(layer, nn.Linear | nn.LayerNorm) else {})
        for layer in projector.children()
    ]
    kind, known = type(projector), all(type(layer) in LAYERS for layer in projector.children())
    if kind is nn.Sequential and known and repr(build_projector(described)) == repr(projector):
        return described
    _logger.warning(
        "the projector, a %s, cannot be described in a file: give it to from_pretrained as projector=...", kind.__name__
    )
    return kind.__name__


def build_projector(described: Any) -> Any:
    """Build the projector that `describe_projector` described, or None; a `WeightsError` says what is needed."""
    if described is None:
        return None
    if isinstance(described, str):
        raise WeightsError(f"the projector, a {described[:80]}, cannot be built from a file: pass one like it as projector=...")
    with building(f"the projector {str(described)[:200]}"):
        if all(isinstance(width, int) for width in described):  # of an MLP, as files before 1.0 have them
            check_sizes({"projector": described}, "the pretraining model")
            return _mlp(described)
        layers = []
        for arguments in map(dict, described):
            kind = next(kind for kind in LAYERS if kind.__name__ == arguments["layer"])
            check_sizes(arguments, "the projector")
            layers.append(kind(**{name: value for name, value in arguments.items() if name != "layer"}))
        return nn.Sequential(*layers)
