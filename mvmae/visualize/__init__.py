"""Pictures of what a model looks at, what it rebuilds, and what its features tell apart."""

from .attention import attention_maps as attention_maps
from .attention import patch_heat as patch_heat
from .attention import rollout as rollout
from .pictures import GREY as GREY
from .pictures import masked_title as masked_title
from .pictures import nearest as nearest
from .pictures import overlay as overlay
from .pictures import pca_colours as pca_colours
from .pictures import reconstruct as reconstruct
from .pictures import reconstruction_note as reconstruction_note
from .pictures import reconstruction_picture as reconstruction_picture
from .pictures import to_unit_range as to_unit_range
from .sheet import contact_sheet as contact_sheet
from .sheet import heat_colours as heat_colours
from .sheet import to_pillow as to_pillow
