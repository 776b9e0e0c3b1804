"""A plain ViT as the backbone of dense tasks: windowed attention, feature pyramids, and the heads of UPerNet."""

from .pyramid import ViTPyramid as ViTPyramid
from .pyramid import WindowedViT as WindowedViT
from .pyramid import group_norm as group_norm
from .upernet import FCNHead as FCNHead
from .upernet import UPerHead as UPerHead
