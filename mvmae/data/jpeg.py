"""JPEG beyond Pillow: simplejpeg, which is faster, and files that were cut or already opened.

Shapes: H, W pixels of the result, C channels asked for, s reduction of a scaled decode.
"""

from PIL import Image

from .pixels import Pixels

try:
    import simplejpeg
except ImportError:  # an optional decoder, from the `train` extra
    simplejpeg = None


def reread(image: Image.Image) -> bytes | None:
    """Return the bytes of a JPEG that the caller has opened but not decoded, so that the image stays as it was."""
    if getattr(image, "format", None) not in ("JPEG", "MPO") or not getattr(image, "tile", None):
        return None
    file = getattr(image, "fp", None)
    if file is None or file.closed or getattr(image, "decoderconfig", ()) not in ((), None):
        return None
    position = file.tell()
    file.seek(0)
    encoded: bytes = file.read()
    file.seek(position)
    return encoded if encoded[:2] == b"\xff\xd8" else None


def zero_tail(encoded: bytes) -> int:
    """Return how many zeros end a half-written JPEG, which libjpeg decodes to grey silently; 0 for a whole one."""
    if not encoded.endswith(bytes(64)):
        return 0
    body = encoded.rstrip(b"\0")
    return 0 if body.endswith(b"\xff\xd9") else len(encoded) - len(body)


def can_decode(channels: int, mode: str) -> bool:
    """Return whether `decode` can make channels of an image in this mode of Pillow's."""
    return simplejpeg is not None and channels in (1, 3) and mode in ("L", "RGB")


def decode(encoded: bytes, channels: int, size: tuple[int, int], reduction: int) -> Pixels:
    """Decode grey or RGB with simplejpeg, at 1 / s, to (H, W, C).

    Raises:
        ValueError: Damaged, or of another size than expected; also for harmless warnings.
    """
    # simplejpeg without min_height and min_width does not scale
    least = {"min_height": size[0], "min_width": size[1], "min_factor": reduction} if reduction > 1 else {}
    pixels: Pixels = simplejpeg.decode_jpeg(encoded, "GRAY" if channels == 1 else "RGB", strict=True, **least)
    if pixels.shape[:2] != size:
        raise ValueError(f"decoded to {pixels.shape[:2]}, expected {size}")
    return pixels
