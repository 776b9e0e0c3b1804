"""What would take all memory, or minutes, is refused from its header; what only looks so is read."""

import gzip
import io
import subprocess
import sys
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from mvmae.data.limits import LimitError
from PIL import Image

from mvmae.data import ImageError, limits, open_image, open_images


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def tiff(
    width: int, height: int, bands: int, data: bytes, *, compression: int, more: tuple[tuple[int, int], ...] = ()
) -> bytes:
    """A TIFF of 8-bit bands whose only strip, or tile, is `data`."""
    offset, length = (324, 325) if more else (273, 279)
    tags = {256: width, 257: height, 258: 8, 259: compression, 262: 1, 277: bands, 278: height, offset: 0, length: len(data)}
    tags |= dict(more)
    if more:
        del tags[278]
    start = 8 + 2 + 12 * len(tags) + 4
    tags[offset] = start
    entries = b"".join(
        tag.to_bytes(2, "little") + (4).to_bytes(2, "little") + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, value in sorted(tags.items())
    )
    return b"II*\0" + (8).to_bytes(4, "little") + len(tags).to_bytes(2, "little") + entries + bytes(4) + data


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last pass over the pixels comes so many times."""
    encoded = encode(Image.linear_gradient("L").resize((64, 48)), "JPEG", progressive=True)
    start = encoded.rindex(b"\xff\xc4", 0, encoded.rindex(b"\xff\xda"))
    return encoded[:start] + encoded[start:-2] * count + encoded[-2:]


def test_a_file_too_large_for_an_image_is_not_read(tmp_path):
    path = tmp_path / "sparse.jpg"
    with path.open("wb") as file:
        file.write(b"\xff\xd8\xff")
        file.truncate(2**29)
    tracemalloc.start()
    with pytest.raises(ImageError, match="a file of 536870912 bytes, more than the 416777216 for 100000000 pixels"):
        open_image(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert limits.most_bytes(200_000_000) > 2**29


@pytest.mark.parametrize("compression", [8, 34925])
def test_a_tiff_of_many_bands_is_refused_from_its_header(compression):
    pytest.importorskip("tifffile")
    data = zlib.compress(bytes(5 * 64 * 48)) if compression == 8 else __import__("lzma").compress(bytes(5 * 64 * 48))
    assert open_image(tiff(64, 48, 5, data, compression=compression)).decode(channels=5).shape == (48, 64, 5)
    with pytest.raises(ImageError, match=r"bands of 3000000000 bytes, more than the 400000000 for 100000000 pixels"):
        open_image(tiff(30_000, 20_000, 5, data, compression=compression))


@pytest.mark.parametrize("compression", [8, 34925])
def test_a_strip_that_unpacks_to_more_than_it_says_is_refused(compression):
    pytest.importorskip("tifffile")
    pack = zlib.compress if compression == 8 else __import__("lzma").compress
    bomb = tiff(64, 48, 5, pack(bytes(50_000_000)), compression=compression)
    tracemalloc.start()
    with pytest.raises(ImageError, match="a strip of more than 40001 bytes, more than the 40000 for 10000 pixels"):
        open_image(bomb, max_pixels=10_000)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000  # LZMA's window takes 8 MB of them
    tracemalloc.stop()


def test_a_tiff_with_a_tile_larger_than_any_image_is_refused():
    pytest.importorskip("tifffile")
    for bands in (1, 5):
        tile = zlib.compress(bytes(bands * 256 * 256))
        small = tiff(10, 10, bands, tile, compression=8, more=((322, 256), (323, 256)))
        assert open_image(small).decode(channels=bands).shape == (10, 10, bands)
        with pytest.raises(ImageError, match="a tile"):
            open_image(tiff(10, 10, bands, tile, compression=8, more=((322, 30_000), (323, 30_000))))


def test_a_jpeg_2000_counts_for_what_its_decoder_takes():
    picture = Image.linear_gradient("L").resize((300, 300)).convert("RGB")
    whole, tiled = encode(picture, "JPEG2000"), encode(picture, "JPEG2000", tile_size=(64, 64))
    assert open_image(whole).decode().shape == open_image(tiled, max_pixels=90_000).decode().shape == (300, 300, 3)
    with pytest.raises(ImageError, match="a tile takes as much memory as 135000 pixels, more than the limit of 90000"):
        open_image(whole, max_pixels=90_000)


def test_f64_a_jpeg_of_thousands_of_scans_is_one_bad_image():
    with pytest.raises(ImageError, match="scans, more than the 100 allowed"):
        open_image(many_scans(6000)).decode()
    for decoder in ("fast", "pillow"):
        assert open_image(many_scans(10)).decode(decoder=decoder).shape == (48, 64, 3)


# Archives


def pack(path: Path, members: dict[str, int]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, size in members.items():
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
    return path


def test_a_compressed_shard_that_unpacks_to_more_than_half_the_memory_is_refused(tmp_path, monkeypatch):
    path = pack(tmp_path / "x.tar.gz", {"a.jpg": 100, "b.jpg": 30_000_000, "c.jpg": 100})
    assert len(open_images(path)) == 3
    monkeypatch.setattr(limits, "usable_memory", lambda: 2 * 20_000_000)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"x\.tar\.gz take 28 MB, more than half of the 38 MB of memory: unpack it to a \.tar"):
        open_images(path)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    many = {f"{i}.jpg": 0 for i in range(50_000)}  # a header of 512 bytes each
    with pytest.raises(ValueError, match="more than half"):
        open_images(pack(tmp_path / "headers.tar.gz", many))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_tar_header_of_megabytes_is_damage(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
        info = tarfile.TarInfo("note")
        info.type, info.size = kind, 50_000_000
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    tracemalloc.start()
    source = open_images(tmp_path / "x.tar.gz")
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    assert len(source) == 1 and "a header of 50000000 bytes" in source.problems[0]


def test_a_member_of_a_tar_that_is_too_large_for_an_image_is_a_bad_image(tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = 5000
        tar.addfile(info, io.BytesIO(bytes(5000)))
    monkeypatch.setattr("mvmae.data.archives.most_bytes", lambda: 4000)
    with pytest.raises(ImageError, match="5000 bytes, more than the 4000"):
        open_images(tmp_path / "x.tar")[0]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_idx_file_is_refused_from_its_header(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"

    def write(*shape: int, size: int) -> Path:
        data = b"\x00\x00\x08\x03" + np.array(shape, ">u4").tobytes() + bytes(size)
        path.write_bytes(gzip.compress(data) if suffix else data)
        return path

    monkeypatch.setattr(limits, "usable_memory", lambda: 2 * 20_000_000)
    tracemalloc.start()
    with pytest.raises(ValueError, match="whose header says 60 x 1000 x 1000 bytes, take 57 MB, more than half of the 38 MB"):
        open_images(write(60, 1000, 1000, size=60_000_000))
    with pytest.raises(ValueError, match="holds more than 600 bytes, its header says 6 x 10 x 10"):
        open_images(write(6, 10, 10, size=60_000_000))
    tracemalloc.stop()
    for shape in ((2**32 - 1, 0, 10), (2**32 - 1, 1, 1)):
        with pytest.raises(ValueError, match="holds no pixels|more than half"):
            open_images(write(*shape, size=0))
    assert len(open_images(write(6, 10, 10, size=600))) == 6


def table(path: Path, images: list[bytes], *, dictionary: bool) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"image": pa.array(images)}), path, compression="zstd", use_dictionary=dictionary)
    return path


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_parquet_file_counts_for_what_it_unpacks_to(tmp_path, monkeypatch, dictionary):
    path = table(tmp_path / "x.parquet", [bytes(1_000_000)] * 60, dictionary=dictionary)  # one value, stored once or packed
    assert path.stat().st_size < 100_000 and len(open_images(path)) == 60
    monkeypatch.setattr(limits, "usable_memory", lambda: 2 * 20_000_000)
    with pytest.raises(ValueError, match=r"x\.parquet take \d+ MB, more than half of the 38 MB of memory: use `hfds/FOLDER`"):
        open_images(path)


@pytest.mark.linux
def test_the_memory_of_a_container_or_of_ulimit_counts():
    pytest.importorskip("resource")
    code = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33));"
    code += "import sys; sys.path.insert(0, sys.argv[1]); import limits; print(limits.usable_memory())"
    folder = str(Path(limits.__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=60, check=True)
    assert 0 < int(done.stdout) <= 2**33 and 0 < limits.usable_memory() < 2**63
    with pytest.raises(LimitError, match="x take 8796093022208 MB, more than half"):
        limits.check_memory(2**63, "x", "y")
