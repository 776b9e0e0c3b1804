"""From images on a disk, in archives or in data sets to the batches of a run: sources, views, sampling, loading.

A source (`open_images`) names images, a transform (`MultiViewTransform`) decodes one and crops its views, a sampler
(`StepSampler`) says which image stands where in which step, and a loader (`Loader`) fills batches in processes of its own.
Images that can only be read in order, such as shards behind URLs, are a stream (`open_stream`, `stream_loader`). `embed`
computes the features of all images of a source.
"""

from .augment import AugmentedViews as AugmentedViews
from .augment import ColorJitter as ColorJitter
from .decode import MAX_PIXELS as MAX_PIXELS
from .decode import ImageError as ImageError
from .decode import ImageLike as ImageLike
from .decode import open_image as open_image
from .decode import read_pixels as read_pixels
from .decode import to_pil as to_pil
from .features import EvalTransform as EvalTransform
from .features import embed as embed
from .features import embed_rows as embed_rows
from .features import measure_channels as measure_channels
from .features import normalize as normalize
from .features import pixel_options as pixel_options
from .formats import FORMATS as FORMATS
from .loader import Loader as Loader
from .open import is_stream as is_stream
from .open import open_images as open_images
from .pixels import colour as colour
from .ranges import decide_range as decide_range
from .sampling import Batch as Batch
from .sampling import DataError as DataError
from .sampling import MultiViewDataset as MultiViewDataset
from .sampling import StepSampler as StepSampler
from .sampling import sample_seed as sample_seed
from .sources import FileSource as FileSource
from .sources import ImageSource as ImageSource
from .splits import SplitError as SplitError
from .streams import ImageStream as ImageStream
from .streams import open_stream as open_stream
from .streams import stream_loader as stream_loader
from .tables import DatasetSource as DatasetSource
from .views import CentreCropTransform as CentreCropTransform
from .views import MultiViewTransform as MultiViewTransform
