"""Export models to timm, transformers and the Hub with a model card, and load other people's weights."""

from ..loading import load_encoder as load_encoder
from ..loading import load_pretraining as load_pretraining
from ..weights import load_weights as load_weights
from .card import license_warning as license_warning
from .card import write_card as write_card
from .export import build as build
from .export import describe as describe
from .export import export as export
from .export import published as published
from .export import push as push
from .onnx import require_onnx as require_onnx
from .onnx import write_onnx as write_onnx
