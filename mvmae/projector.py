"""The projection head before Eq. 4 (the paper has none), and how a file describes one."""

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from .files import WeightsError, building, check_sizes

LAYERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
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


def projection_mlp(in_dim: int, hidden_dim: int = 2048, out_dim: int = 256) -> nn.Sequential:
    """Build the projection head of SimCLR (Chen et al., 2020): linear, ReLU, linear. The paper has none.

    Args:
        in_dim: width D of the encoder.
        hidden_dim: width between the two layers.
        out_dim: width of the vectors that are compared.
    """
    return _mlp([in_dim, hidden_dim, out_dim])


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    """Build linear layers of the given widths, with a ReLU between two of them."""
    layers: list[nn.Module] = []
    for in_dim, out_dim in pairwise(widths):
        layers += [nn.Linear(in_dim, out_dim), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def describe_projector(projector: nn.Module) -> list[Any] | str | None:
    """Return what rebuilds a projector, in types that JSON can hold: the widths of an MLP, its layers, or None.

    Where neither is enough, return the name of its class and log a warning.
    """
    if isinstance(projector, nn.Identity):
        return None
    linears = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    widths = [linear.in_features for linear in linears[:1]] + [linear.out_features for linear in linears]
    layers = [
        {"layer": type(layer).__name__, **{name: getattr(layer, name) for name in LAYERS.get(type(layer), ())}}
        | ({"bias": layer.bias is not None} if isinstance(layer, nn.Linear | nn.LayerNorm) else {})
        for layer in projector.children()
    ]
    for described in (widths, layers):
        try:
            rebuilt = build_projector(described)
        except WeightsError:
            continue
        if repr(rebuilt) == repr(projector) and rebuilt.state_dict().keys() == projector.state_dict().keys():
            return described
    kind = type(projector).__name__
    _logger.warning("the projector, a %s, cannot be described in a file: give it to from_pretrained as projector=...", kind)
    return kind


def build_projector(described: Any) -> Any:
    """Build the projector that `describe_projector` described, or None.

    Raises:
        WeightsError: if the description is only a name, or fits no module.
    """
    if described is None:
        return None
    if isinstance(described, str):
        raise WeightsError(f"the projector, a {described[:80]}, cannot be built from a file: pass one like it as projector=...")
    with building(f"the projector {str(described)[:200]}"):
        if all(isinstance(width, int) for width in described):
            check_sizes({"projector": described}, "the pretraining model")
            return _mlp(described)
        layers = []
        for arguments in map(dict, described):
            kind = next(kind for kind in LAYERS if kind.__name__ == arguments["layer"])
            check_sizes(arguments, "the projector")
            layers.append(kind(**{name: value for name, value in arguments.items() if name != "layer"}))
        return nn.Sequential(*layers)
