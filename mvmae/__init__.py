"""Multi-View Masked Autoencoder: timm-compatible encoders and their pretraining.

``import mvmae`` registers the encoders ``mvmae_vit_*`` with timm. Most use ``create_model``, ``embed``, ``MultiViewTransform``,
``MultiViewMAE``, ``backward_in_parts``, ``hub.export`` and ``hub.push``: ``help`` of each says what it takes. Rooms
such as ``mvmae.hub``, and what comes from ``mvmae.data``, are imported when they are first asked for. Where to read:

- the method, in the order of the paper: ``model`` (Eqs. 1 to 7), ``patches``, ``masking``, ``masked_vit``, ``decoder``,
  ``losses`` with ``gradients``, ``projector``, ``accumulation``, ``metrics``;
- its encoders and their files: ``encoders``, ``architecture``, ``weights``, ``inputs``; other people's: ``families``,
  ``checkpoints``, ``loading``;
- what stands around the method: ``data``, ``dense``, ``visualize``, ``hub``.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from .accumulation import Losses as Losses
from .accumulation import backward_in_parts as backward_in_parts
from .decoder import MAEDecoder as MAEDecoder
from .loading import create_model as create_model
from .losses import NTXentLoss as NTXentLoss
from .losses import ReconstructionLoss as ReconstructionLoss
from .masked_vit import encode_visible as encode_visible
from .masking import Mask as Mask
from .masking import num_visible as num_visible
from .masking import random_mask as random_mask
from .model import MultiViewMAE as MultiViewMAE
from .model import MultiViewOutput as MultiViewOutput
from .patches import patchify as patchify
from .patches import unpatchify as unpatchify
from .projector import projection_mlp as projection_mlp
from .weights import WeightsError as WeightsError

if TYPE_CHECKING:
    from .data import CentreCropTransform as CentreCropTransform
    from .data import MultiViewTransform as MultiViewTransform
    from .data import embed as embed

__version__ = "0.1.0.dev0"
_OF_DATA = ("CentreCropTransform", "MultiViewTransform", "embed")


def __getattr__(name: str) -> Any:
    if name in _OF_DATA:
        return getattr(import_module(f"{__name__}.data"), name)
    module = f"{__name__}.{name}"
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *_OF_DATA, *(module.name for module in iter_modules(__path__))})
