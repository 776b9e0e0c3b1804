"""A plain ViT as the backbone of dense tasks: windowed attention, feature pyramids, and the heads of UPerNet."""

from .pyramid import ViTPyramid, WindowedViT, group_norm
from .upernet import FCNHead, UPerHead

__all__ = ["FCNHead", "UPerHead", "ViTPyramid", "WindowedViT", "group_norm"]
