"""Opening one image: every kind comes out as 8-bit pixels, every fault as one error with a reason."""

import ast
import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from pictures import encode
from PIL import EpsImagePlugin, Image, ImageFile, ImageOps

from mvmae.data import FORMATS, ImageError, colour, decode, open_image
from mvmae.data.pixels import to_uint8


def pillow_alone():
    """As where simplejpeg is not installed."""
    return mock.patch.object(decode, "simplejpeg", None)


def photograph(width: int = 96, height: int = 64) -> Image.Image:
    """A smooth colourful picture with some detail."""
    y, x = np.mgrid[:height, :width]
    planes = [40 + 100 * x / width, 60 + 90 * y / height, 120 + 40 * np.sin(x / 7) * np.cos(y / 9)]
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


def deep(factor: int, mode: str) -> Image.Image:
    grey = np.asarray(photograph().convert("L"))
    return Image.fromarray(grey.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]) * factor)


def with_transparency() -> bytes:
    return encode(photograph().quantize(64), "PNG", transparency=bytes(range(64)))


def fading() -> Image.Image:
    image = photograph()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


MODES = {
    "jpeg": lambda: encode(photograph(), quality=95),
    "progressive": lambda: encode(photograph(), quality=95, progressive=True),
    "cmyk": lambda: encode(photograph().convert("CMYK"), quality=95),
    "cmyk-tiff": lambda: encode(photograph().convert("CMYK"), "TIFF"),
    "mpo": lambda: encode(photograph(), "MPO", save_all=True, append_images=[photograph()], quality=95),
    "webp": lambda: encode(photograph(), "WEBP", quality=95),
    "tiff": lambda: encode(photograph(), "TIFF"),
    "bmp": lambda: encode(photograph(), "BMP"),
    "gif": lambda: encode(photograph(), "GIF"),
    "animated": lambda: encode(photograph(), "GIF", save_all=True, append_images=[Image.new("RGB", (96, 64))] * 3),
    "palette": lambda: encode(photograph().quantize(128), "PNG"),
    "rgba": lambda: encode(photograph().convert("RGBA"), "PNG"),
}
GREY_MODES = {
    "grey": lambda: encode(photograph().convert("L"), "PNG"),
    "grey-jpeg": lambda: encode(photograph().convert("L"), quality=95),
    "grey-alpha": lambda: encode(photograph().convert("LA"), "PNG"),
    "1-bit": lambda: encode(photograph().convert("1"), "PNG"),
    "I;16": lambda: encode(deep(257, "I;16"), "PNG"),
    "I;16-tiff": lambda: encode(deep(257, "I;16"), "TIFF"),
    "F": lambda: encode(Image.fromarray(np.asarray(deep(1, "F")) / 255), "TIFF"),
}


DEEP = ("I;16", "I;16-tiff", "F")


@pytest.mark.parametrize("kind", [*MODES, *GREY_MODES])
def test_every_kind_of_image_is_converted_as_pillow_does_and_deep_ones_by_their_range(kind):
    encoded = (MODES | GREY_MODES)[kind]()
    for channels, mode in ((3, "RGB"), (1, "L")):
        with Image.open(io.BytesIO(encoded)) as image:
            if image.format in ("JPEG", "MPO") and channels == 1:
                image.draft("L", image.size)  # the luma as it is stored, without a detour
            expected = np.asarray(photograph().convert("L").convert(mode) if kind in DEEP else image.convert(mode))
        opened = open_image(encoded, channels=channels)
        with pillow_alone():
            np.testing.assert_array_equal(opened.decode().squeeze(), expected)
        assert np.abs(opened.decode().squeeze() - expected.astype(float)).mean() < 0.1


TRANSPARENT = {
    "palette-alpha": with_transparency,
    "palette-key": lambda: encode(photograph().quantize(8), "PNG", transparency=3),
    "gif": lambda: encode(photograph().quantize(8), "GIF", transparency=3),
    "grey-key": lambda: encode(photograph().convert("L"), "PNG", transparency=95),
    "colour-key": lambda: encode(photograph().quantize(8).convert("RGB"), "PNG", transparency=most_common()),
    "grey-alpha": lambda: encode(fading().convert("LA"), "PNG"),
    "rgba": lambda: encode(fading(), "PNG"),
    "webp": lambda: encode(fading(), "WEBP", lossless=True),
    "tiff": lambda: encode(fading(), "TIFF"),
}


def most_common() -> tuple[int, ...]:
    return max(photograph().quantize(8).convert("RGB").getcolors())[1]


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_f46_what_is_transparent_is_laid_on_the_background(kind):
    with Image.open(io.BytesIO(TRANSPARENT[kind]())) as image:
        rgba = image.convert("RGBA")
    for background in ((255, 255, 255), (0, 0, 0), (200, 30, 90)):
        laid = Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB")
        assert np.asarray(laid).tolist() != np.asarray(rgba.convert("RGB")).tolist()
        opened = open_image(TRANSPARENT[kind]()).decode(background=background)
        assert np.abs(opened - np.asarray(laid).astype(int)).max() <= 1, background
        grey = open_image(TRANSPARENT[kind](), channels=1).decode(background=background)
        assert np.abs(grey[..., 0] - np.asarray(laid.convert("L")).astype(int)).max() <= 2, background
        if background == (255, 255, 255):
            np.testing.assert_array_equal(open_image(TRANSPARENT[kind]()).decode(), opened)


def test_an_opaque_image_is_the_same_on_every_background_and_alpha_that_is_asked_for_is_kept():
    opaque = [MODES[kind]() for kind in ("palette", "rgba", "bmp", "tiff")]
    for encoded in (*opaque, GREY_MODES["grey-alpha"](), np.asarray(photograph().convert("RGBA"))):
        pictures = [open_image(encoded).decode(background=colour) for colour in ((0, 0, 0), (255, 255, 255))]
        np.testing.assert_array_equal(*pictures)
        if not isinstance(encoded, np.ndarray):
            with Image.open(io.BytesIO(encoded)) as image:
                np.testing.assert_array_equal(pictures[0], np.asarray(image.convert("RGB")))
    np.testing.assert_array_equal(open_image(TRANSPARENT["rgba"](), channels=4).decode(), np.asarray(fading()))


def test_arrays_and_tensors_with_alpha_are_laid_on_the_background_too_whose_colour_is_read_as_css_writes_it():
    assert colour("white") == (255, 255, 255) and colour("#102030") == (16, 32, 48)
    with pytest.raises(ValueError, match="background must be a colour such as white or #808080, got 'whit'"):
        colour("whit")
    rgba = np.asarray(fading())
    expected = open_image(encode(fading(), "PNG")).decode(background=(9, 8, 7))
    for array in (rgba, torch.from_numpy(rgba.copy()).permute(2, 0, 1)):
        np.testing.assert_array_equal(open_image(array).decode(background=(9, 8, 7)), expected)
    grey = np.dstack([np.full((2, 2), 100, np.uint8), np.array([[0, 255], [128, 51]], np.uint8)])
    assert open_image(grey, channels=1).decode(background=(50, 50, 50))[..., 0].tolist() == [[50, 100], [75, 60]]


@pytest.mark.posix
def test_f58_no_file_is_taken_for_what_another_program_would_draw(tmp_path, monkeypatch):
    program, ran = tmp_path / "gs", tmp_path / "ran"
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(program))
    (tmp_path / "x.jpg").write_bytes(encode(photograph(), "EPS"))
    with pytest.raises(ImageError, match="not an image: begins with b'%!PS-Adobe"):
        open_image(tmp_path / "x.jpg").decode()
    assert not ran.exists()


def test_f58_every_call_of_image_open_names_the_formats():
    root, found = Path(decode.__file__).parents[2], 0
    for path in [*root.glob("mvmae/**/*.py"), *root.glob("examples/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                assert "formats" in [keyword.arg for keyword in node.keywords], f"{path.name}:{node.lineno}"
                found += 1
    assert found
    assert all(Image.OPEN.get(name) or Image.init() for name in FORMATS)


@pytest.mark.parametrize("size", [(640, 480), (641, 483), (97, 33)])
def test_scaled_decoding_gives_the_box_means_of_the_full_image(size):
    encoded = encode(photograph(*size), quality=95)
    with pillow_alone():
        full = open_image(encoded).decode().astype(float)
    for reduction in (1, 2, 4, 8):
        height, width = size[1] // reduction, size[0] // reduction
        means = full[: height * reduction, : width * reduction].reshape(height, reduction, width, reduction, 3).mean((1, 3))
        fast = open_image(encoded).decode(reduction=reduction)
        with pillow_alone():
            plain = open_image(encoded).decode(reduction=reduction)
        assert fast.shape == plain.shape == (-(-size[1] // reduction), -(-size[0] // reduction), 3)
        assert max(np.abs(pixels[:height, :width] - means).mean() for pixels in (fast, plain)) < 1.5, reduction


def test_both_jpeg_decoders_agree():
    pytest.importorskip("simplejpeg")
    encoded = encode(photograph(500, 375), quality=90)
    fast = open_image(encoded).decode().astype(int)
    with pillow_alone():
        assert np.abs(fast - open_image(encoded).decode()).mean() < 0.1


def test_a_harmless_jpeg_warning_does_not_cost_the_image():
    encoded = encode(photograph())
    position = encoded.rindex(b"\xff\xd9")
    extra = encoded[:position] + b"\x00\x11\x22" + encoded[position:]
    assert open_image(extra).decode().shape == (64, 96, 3)
    assert open_image(encoded + bytes(4096)).decode().shape == (64, 96, 3)  # padding after the end


def damaged() -> dict[str, bytes]:
    jpeg, png = encode(photograph(320, 240)), encode(photograph(320, 240), "PNG")
    crc = bytearray(png)
    crc[png.index(b"IDAT") + 40] ^= 0xFF
    return {
        "empty": b"",
        "html": b"<!DOCTYPE html><title>404</title>",
        "cut jpeg": jpeg[: len(jpeg) // 2],
        "zero half": jpeg[: len(jpeg) // 2] + bytes(len(jpeg) // 2),
        "header": jpeg[:20],
        "cut png": png[: len(png) // 2],
        "crc": bytes(crc),
        "cut webp": encode(photograph(), "WEBP")[:200],
        "cut npy": b"\x93NUMPY\x01\x00",
        "object npy": pickled_array(),
    }


def pickled_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", damaged())
def test_a_damaged_file_is_one_error_with_path_and_one_line(kind, tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(damaged()[kind])
    with pytest.raises(ImageError), pillow_alone():
        open_image(path).decode()
    with pytest.raises(ImageError) as caught:
        open_image(path).decode()
    assert caught.value.path == str(path) and caught.value.reason
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    reasons = {"empty": "empty file", "html": "begins with b'<!DOCTYPE", "zero half": "ends in"}
    assert reasons.get(kind, "") in caught.value.reason


@pytest.mark.posix
def test_what_is_no_readable_file_is_an_image_error(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("fifo.jpg", "folder.jpg", "absent.jpg"):
        with pytest.raises(ImageError, match=name):
            open_image(tmp_path / name)


def test_random_bit_flips_neither_crash_nor_hang():
    rng = np.random.default_rng(0)
    outcomes = {"good": 0, "bad": 0}
    files = [encode(photograph(), f) for f in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")]
    for trial in range(300):
        data = bytearray(files[trial % len(files)])
        for position in rng.integers(0, len(data), 1 + trial % 8):
            data[position] ^= 1 << int(rng.integers(8))
        try:
            opened = open_image(bytes(data))
            assert opened.decode().shape == (opened.height, opened.width, 3)
            outcomes["good"] += 1
        except ImageError:
            outcomes["bad"] += 1
    assert min(outcomes.values()) > 10


def bomb(side: int) -> bytes:
    """A black RGB PNG of side x side, made row by row."""
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(1 + 3 * side)) for _ in range(16)) + packer.flush()
    return png((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_decompression_bomb_is_refused_from_its_header(tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(30_000))
    loaded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", loaded.append)
    tracemalloc.start()
    with pytest.raises(ImageError, match="30000 x 30000 pixels, more than the limit of 100000000"):
        open_image(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert loaded == [] and peak < 5_000_000


def test_the_limit_of_pixels_is_an_option_and_leaves_pillows_own_alone():
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageError, match="limit of 100"):
        open_image(encode(photograph()), max_pixels=100)
    assert open_image(bomb(30_000), max_pixels=10**9).width == 30_000
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pixels_are_stored_as_they_are_and_upright_as_pillow_turns_them(file_format):
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        encoded = encode(photograph(), file_format, exif=exif)
        with Image.open(io.BytesIO(encoded)) as image:
            upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        opened = open_image(encoded)
        assert opened.upright_size == upright.shape[:2], orientation
        with pillow_alone():
            np.testing.assert_array_equal(opened.upright(opened.decode()), upright)
        np.testing.assert_array_equal(np.asarray(decode.to_pil(Image.open(io.BytesIO(encoded)))), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # Pillow's own
def test_a_broken_exif_block_does_not_cost_the_image():
    opened = open_image(encode(photograph(), exif=b"Exif\0\0II*\0" + b"\xff" * 40))
    assert opened.orientation == 1 and opened.decode().shape == (64, 96, 3)


def test_paths_pillow_images_arrays_and_tensors_are_images_and_nothing_else(tmp_path):
    path, rgb = tmp_path / "x.png", np.asarray(photograph())
    photograph().save(path)
    arrays = (rgb, torch.from_numpy(rgb.copy()).permute(2, 0, 1), rgb.transpose(2, 0, 1), rgb / 255.0)
    for source in (path, str(path), photograph(), *arrays):
        np.testing.assert_array_equal(open_image(source).decode(), rgb)
    np.testing.assert_array_equal(open_image(rgb[..., 0]).decode(), np.repeat(rgb[..., :1], 3, axis=2))
    assert open_image(rgb, channels=1).decode().shape == (64, 96, 1)
    for source in (None, 3, {}):
        with pytest.raises(ImageError, match="must be a path, bytes, Pillow image, tensor or array, got a"):
            open_image(source)


@pytest.mark.parametrize("channels", [2, 4, 5, 13])
def test_images_with_other_channels_come_from_npy_and_tiff(channels, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    array = np.random.default_rng(0).integers(0, 256, (24, 32, channels), dtype=np.uint8)
    np.save(tmp_path / "last.npy", array)
    np.save(tmp_path / "first.npy", array.transpose(2, 0, 1).copy())
    np.save(tmp_path / "deep.npy", array.astype(np.uint16) * 257)
    tifffile.imwrite(tmp_path / "bands.tif", array.transpose(2, 0, 1).copy(), planarconfig="separate", photometric=1)
    tifffile.imwrite(tmp_path / "packed.tif", array, photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(tmp_path / "pages.tif", array.transpose(2, 0, 1).copy(), photometric="minisblack")
    tifffile.imwrite(tmp_path / "deep.tif", array.transpose(2, 0, 1).astype(np.uint16) * 257, photometric="minisblack")
    with tifffile.TiffFile(tmp_path / "pages.tif") as file:
        assert len(file.pages) == channels
    for name in ("last.npy", "first.npy", "deep.npy", "bands.tif", "packed.tif", "pages.tif", "deep.tif"):
        np.testing.assert_array_equal(open_image(tmp_path / name, channels=channels).decode(), array, err_msg=name)


def test_wrong_channels_are_refused_with_both_numbers():
    with pytest.raises(ImageError, match=r"must have 3 channels \(in_chans\), got 5"):
        open_image(np.zeros((8, 8, 5), np.uint8)).decode()
    with pytest.raises(ImageError, match=r"must have 5 channels \(in_chans\), got 3 of mode RGB"):
        open_image(encode(photograph()), channels=5).decode()


def test_deep_pixels_are_scaled_by_the_range_of_their_type_or_the_users():
    assert to_uint8(np.array([0, 255, 65535], np.uint16)).tolist() == [0, 1, 255]
    assert to_uint8(np.array([0, 32767], np.int16)).tolist() == [0, 255]
    assert to_uint8(np.array([0.0, 0.5, np.nan])).tolist() == [0, 128, 0]
    assert to_uint8(np.array([True, False])).tolist() == [255, 0]
    assert to_uint8(np.array([-5, 0, 2048, 4095, 9999]), (0, 4095)).tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(np.array([-1.0, np.nan, 1.0]), (-1, 1)).tolist() == [0, 0, 255]


def test_the_range_is_never_guessed_from_one_image():
    calm = np.linspace(0, 1, 1000).reshape(10, 100)
    hot = calm.copy()
    hot[0, 0] = 1.02
    same = open_image(hot).decode() == open_image(calm).decode()
    assert same.sum() == same.size - 3  # one pixel above 1 is one pixel of three channels
    for wrong in (calm * 255, calm - 0.5, (calm * 255).astype(np.int32), (calm * 255).astype(np.int64)):
        with pytest.raises(ImageError, match="give value_range"):
            open_image(wrong).decode()
    np.testing.assert_array_equal(open_image(calm * 255).decode(value_range=(0, 255)), open_image(calm).decode())
    eight = np.arange(64, dtype=np.uint8).reshape(8, 8)
    np.testing.assert_array_equal(open_image(eight, channels=1).decode(value_range=(0, 4095))[..., 0], eight)


RANDOM = np.random.default_rng(0).integers(0, 65536, (9, 11, 7)).astype(np.uint16)
FLOATS = RANDOM[..., 0].astype(np.float32) / 65535
SEEN = {  # pixels, how they are written, what is asked for -> the values that 0 and 1 stand for
    "white is 0": (RANDOM[..., 0], {"photometric": "miniswhite"}, {}, 1 - FLOATS[..., None]),
    "white is 0, 8 bits": ((RANDOM[..., 0] >> 8).astype(np.uint8), {"photometric": "miniswhite"}, {}, 1 - FLOATS[..., None]),
    "white is 0, floats": (FLOATS, {"photometric": "miniswhite"}, {}, 1 - FLOATS[..., None]),
    "signed": ((RANDOM[..., :3] >> 1).astype(np.int16), {"photometric": "rgb"}, {}, RANDOM[..., :3] / 65535),
    "no alpha": (RANDOM[..., :4], {"photometric": "rgb", "extrasamples": [0]}, {}, RANDOM[..., :3] / 65535),
    "all of it": (RANDOM[..., :4], {"photometric": "rgb", "extrasamples": [0]}, {"channels": 4}, RANDOM[..., :4] / 65535),
    "bands": (RANDOM, {"photometric": "minisblack", "planarconfig": "contig"}, {"channels": 7}, RANDOM / 65535),
}
for compression in (None, "zlib"):
    for order, pixels in (("contig", RANDOM[..., :3]), ("separate", RANDOM[..., :3].transpose(2, 0, 1).copy())):
        written = {"photometric": "rgb", "planarconfig": order, "compression": compression}
        of = (RANDOM[..., :3].clip(99, 4095) - 99.0) / (4095 - 99)
        SEEN[f"{order}, {compression}"] = (pixels, written, {"value_range": (99, 4095)}, of)


@pytest.mark.parametrize("kind", SEEN)
def test_what_a_tiff_says_of_its_pixels_decides(kind):
    tifffile, file = pytest.importorskip("tifffile"), io.BytesIO()
    pixels, written, asked, expected = SEEN[kind]
    tifffile.imwrite(file, pixels, **written)
    opened = open_image(file.getvalue(), channels=asked.get("channels", 3))
    assert opened.upright_size == (9, 11)
    found = opened.decode(value_range=asked.get("value_range"))
    assert np.abs(found - 255 * np.broadcast_to(expected, found.shape)).max() <= (0.51 if asked else 1)  # Pillow cuts


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(("bands", "photometric"), [(3, "rgb"), (1, "minisblack")])
def test_alpha_by_which_a_tiffs_colours_are_multiplied_or_not_lets_the_same_background_through(bands, photometric, dtype):
    tifffile, most = pytest.importorskip("tifffile"), np.iinfo(dtype).max
    colours, alpha = RANDOM[..., :bands] / 65535, RANDOM[..., 6:] / 65535
    for extra, stored in (("unassalpha", colours), ("assocalpha", colours * alpha)):
        file, pixels = io.BytesIO(), np.rint(np.dstack([stored, alpha]) * most).astype(dtype)
        tifffile.imwrite(file, pixels, photometric=photometric, planarconfig="contig", extrasamples=[extra])
        found = open_image(file.getvalue()).decode(background=(255, 255, 255))
        assert np.abs(found - 255 * (colours * alpha + 1 - alpha)).max() < 2.5, extra


@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 8])
def test_a_tiff_of_many_bands_is_upright(orientation):
    tifffile, file = pytest.importorskip("tifffile"), io.BytesIO()
    tag = (274, 3, 1, orientation, True)
    tifffile.imwrite(file, RANDOM, photometric="minisblack", planarconfig="contig", extratags=[tag])
    opened, band, exif = open_image(file.getvalue(), channels=7), Image.fromarray(high_bytes(RANDOM[..., 2])), Image.Exif()
    exif[0x0112] = orientation
    with Image.open(io.BytesIO(encode(band, "PNG", exif=exif))) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    assert np.abs(opened.upright(opened.decode())[..., 2].astype(int) - upright).max() <= 1


def high_bytes(pixels: np.ndarray) -> np.ndarray:
    return (pixels >> 8).astype(np.uint8)


def test_a_png_of_16_bits_a_channel_takes_the_range_that_is_given():
    header = struct.pack(">IIBBBBB", 11, 9, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in RANDOM[..., :3])
    opened = open_image(png((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")))
    assert opened.upright_size == (9, 11)
    expected = (RANDOM[..., :3].clip(0, 4095) * (255 / 4095)).round()
    np.testing.assert_array_equal(opened.decode(value_range=(0, 4095)), expected)
    np.testing.assert_array_equal(opened.decode(), high_bytes(RANDOM[..., :3]))


def test_the_channels_that_are_asked_for_tell_how_an_array_lies():
    for shape, channels, size in (
        *(((3, 40, 50), 3, (40, 50)), ((40, 50, 3), 3, (40, 50)), ((13, 7, 9), 13, (7, 9)), ((7, 9, 13), 13, (7, 9))),
        *(((2, 13, 13), 2, (13, 13)), ((5, 6, 4), 3, (5, 6)), ((3, 2, 4), 3, (2, 4)), ((5, 4, 3), 5, (4, 3))),
    ):
        assert open_image(np.zeros(shape, np.uint8), channels=channels).upright_size == size, shape
    with pytest.raises(ImageError, match=r"must have 3 channels \(in_chans\), got 6"):
        open_image(np.zeros((4, 5, 6), np.uint8)).decode()
    with pytest.raises(ImageError, match="may stand first or last"):
        open_image(np.zeros((3, 9, 3), np.uint8))
    assert open_image(torch.zeros(3, 9, 3, dtype=torch.uint8)).upright_size == (9, 3)


def test_each_format_is_told_by_its_content_and_read_as_pillow_reads_it(tmp_path):
    Image.init()
    path = tmp_path / "x.jpg"
    for name in sorted(set(FORMATS) & set(Image.SAVE)):
        path.write_bytes(encode(photograph().convert("P" if name == "PCX" else "RGB"), name))
        with Image.open(path, formats=[name]) as image, pillow_alone():
            np.testing.assert_array_equal(open_image(path).decode(), np.asarray(image.convert("RGB")), err_msg=name)


def test_a_tiff_of_twelve_bits_has_the_range_that_its_tag_says():
    values = np.array([[0, 2048, 4095, 1000]] * 2)
    packed = b"".join(int(a << 12 | b).to_bytes(3, "big") for a, b in values.reshape(-1, 2).tolist())
    np.testing.assert_array_equal(open_image(tiff(4, 2, 1, packed, bits=12), channels=1).decode()[0, :, 0], [0, 128, 255, 62])


def tiff(width: int, height: int, bands: int, data: bytes, *, bits: int = 8, compression: int = 1) -> bytes:
    """A TIFF with `data` as its only strip."""
    tags = {256: width, 257: height, 258: bits, 259: compression, 262: 1, 273: 0, 277: bands, 278: height, 279: len(data)}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def test_files_and_bands_too_large_for_an_image_are_refused_from_their_headers(tmp_path):
    pytest.importorskip("tifffile")
    with (tmp_path / "sparse.jpg").open("wb") as file:
        file.write(b"\xff\xd8\xff")
        file.truncate(2**29)
    bands = zlib.compress(bytes(5 * 64 * 48))
    assert open_image(tiff(64, 48, 5, bands, compression=8), channels=5).decode().shape == (48, 64, 5)
    tracemalloc.start()
    for source in (tmp_path / "sparse.jpg", tiff(30_000, 20_000, 5, bands, compression=8)):
        with pytest.raises(ImageError, match="for 100000000 pixels"):
            open_image(source)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
