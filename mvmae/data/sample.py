"""`--data sample`: photographs that come with scikit-image, cut into labelled tiles, so that nothing is downloaded."""

from pathlib import Path
from random import Random

import numpy as np

from .decode import ImageLike, open_image
from .folders import ImageSource
from .pixels import Pixels

PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
    *("gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
_GRID = 10  # each photograph is cut into _GRID x _GRID tiles
_HELD_OUT = 36


class SampleSource(ImageSource):
    """Tiles of 14 photographs, labelled by photograph: 64 of each to train on, 36 others held out.

    A photograph is cut into 10 x 10 tiles of its own pixels (30 x 45 to 141 x 141 pixels, most 51 x 51) that share
    none. The tiles held out are always the same.

    Args:
        split: "train" or "val".
    """

    def __init__(self, split: str) -> None:
        photographs = [_read_photograph(name) for name in PHOTOGRAPHS]
        rng = Random(0)  # noqa: S311
        held_out = [set(rng.sample(range(_GRID**2), _HELD_OUT)) for _ in photographs]
        tiles = [(p, t) for p, held in enumerate(held_out) for t in range(_GRID**2) if (t in held) == (split == "val")]
        super().__init__([f"{PHOTOGRAPHS[p]}#{t}".encode() for p, t in tiles])
        self._photographs = photographs
        self._tiles = np.array(tiles)
        self.labels = self._tiles[:, 0].astype(np.int64)
        self.class_names = tuple(Path(name).stem for name in PHOTOGRAPHS)

    def box(self, index: int) -> tuple[int, int, int, int]:
        """Return the tile's place in its photograph: top, left, height, width."""
        photograph, tile = self._tiles[index]
        height, width = (side // _GRID for side in self._photographs[photograph].shape[:2])
        return int(tile // _GRID * height), int(tile % _GRID * width), height, width

    def image(self, index: int) -> ImageLike:
        """Return the tile as an array."""
        top, left, height, width = self.box(index)
        photograph = self._photographs[self._tiles[index, 0]]
        tile: Pixels = photograph[top : top + height, left : left + width]
        return tile


def _read_photograph(name: str) -> Pixels:
    try:
        import skimage
    except ImportError as error:
        raise ImportError('the sample photographs come with scikit-image: pip install "mvmae[train]"') from error
    return open_image(Path(skimage.__file__).parent / "data" / name).decode(decoder="pillow")
