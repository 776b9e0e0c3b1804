"""Export models to timm, transformers and the Hub with a model card, and load other people's weights."""

from ..loading import load_encoder, load_pretraining
from ..weights import load_weights
from .card import license_warning, write_card
from .export import build, describe, export, published, push
from .onnx import require_onnx, write_onnx

__all__ = [
    "build",
    "describe",
    "export",
    "license_warning",
    "load_encoder",
    "load_pretraining",
    "load_weights",
    "published",
    "push",
    "require_onnx",
    "write_card",
    "write_onnx",
]
