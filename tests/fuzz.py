"""Feeds damaged files to every reader of the package: nothing but the documented errors may come out, within seconds.

Not one of the tests that pytest finds: `pip install hypothesis && python tests/fuzz.py --minutes 10`.
"""

import argparse
import collections
import io
import json
import logging
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import safetensors.torch
import tifffile
import timm
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from engine.checkpoint import read as read_checkpoint
from engine.checkpoint import write as save_checkpoint
from engine.signals import Stop
from mvmae import MultiViewTransform
from mvmae.data import ImageError, open_images
from mvmae.hub import export, write_card
from mvmae.weights import WeightsError, read_weights
from tasks.models import load_backbone

LIMIT = 20  # seconds for one file
PLACE = Path(tempfile.mkdtemp())


def pictures():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
    colour = Image.fromarray(noise).resize((64, 48))
    ways = [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("WEBP", {}), ("TIFF", {}), ("BMP", {})]
    ways += [(kind, {}) for kind in ("ICO", "TGA", "PCX", "SGI", "DDS", "JPEG2000", "AVIF", "QOI")]
    kinds = [(colour, *way) for way in ways]
    kinds += [(colour.convert("CMYK"), "JPEG", {}), (colour.convert("P"), "PNG", {}), (colour.convert("RGBA"), "PNG", {})]
    kinds += [(Image.fromarray(noise[..., 0].astype(np.uint16) * 200), "PNG", {}), (colour.convert("1"), "TIFF", {})]
    exif = Image.Exif()
    exif[274] = 6
    kinds += [(colour, "JPEG", {"exif": exif}), (colour, "TIFF", {"compression": "tiff_lzw"})]
    for image, kind, options in kinds:
        file = io.BytesIO()
        image.save(file, kind, **options)
        yield file.getvalue()
    file = io.BytesIO()
    np.save(file, noise)
    yield file.getvalue()


def tiffs():
    """Channels and content of TIFFs that Pillow reads, and that tifffile reads: whole or in tiles, deflated or not."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 5), dtype=np.uint8)
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        file = io.BytesIO()
        Image.fromarray(noise[..., :3]).save(file, "TIFF", compression=compression)
        yield 3, file.getvalue()
    for options in ({}, {"compression": "zlib"}, {"compression": "zlib", "tile": (16, 16)}, {"bigtiff": True}):
        for bands in (noise, noise.astype(np.uint16) * 200):
            file = io.BytesIO()
            tifffile.imwrite(file, bands, photometric="minisblack", planarconfig="contig", **options)
            yield 5, file.getvalue()


def archives():
    """Name and content of one file of each kind that holds several images."""
    images = list(pictures())[:4]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number, content in enumerate(images):
            for suffix, data in (("png", content), ("cls", b"%d" % number)):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    yield "shard.tar", file.getvalue()
    table = pa.table({"image": [{"bytes": content, "path": None} for content in images], "label": [0, 1, 0, 1]})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    yield "table.parquet", file.getvalue()
    for name, kind in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        file = io.BytesIO()
        with kind(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        yield name, file.getvalue()
    yield "list.txt", b"a.jpg\nb.png\n" + bytes(range(128, 140)) + b".jpg\n"


def weights():
    """Name and content of weights in every format."""
    tensors = {f"layer{i}.weight": torch.arange(60.0).reshape(6, 10) for i in range(3)}
    safetensors.torch.save_file(tensors, PLACE / "w.safetensors")
    yield "w.safetensors", (PLACE / "w.safetensors").read_bytes()
    for number, zipped in enumerate((True, False)):
        torch.save({"model": tensors, "epoch": 3}, PLACE / "w.pth", _use_new_zipfile_serialization=zipped)
        yield f"w{number}.pth", (PLACE / "w.pth").read_bytes()


def config():
    """A small export's config.json; its weights stay beside it."""
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0
    )
    export(vit, PLACE / "export", mean=[0.5] * 3, std=[0.5] * 3)
    return (PLACE / "export/config.json").read_bytes()


def run_state():
    save_checkpoint(PLACE, {"step": 3, "settings": {"a": 1}, "optimizer": {}, "model": {"w": torch.arange(100.0)}})
    return (PLACE / "checkpoint.pt").read_bytes()


place = st.floats(0, 1, exclude_max=True)
change = st.one_of(
    st.tuples(st.just("flip"), place, st.integers(1, 255)),
    st.tuples(st.just("cut"), place, st.integers(0, 255)),
    st.tuples(st.just("zero"), place, st.integers(1, 64)),
    st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=16)),
    st.tuples(st.just("repeat"), place, st.integers(1, 64)),
)
changes = st.lists(change, min_size=1, max_size=6)
pieces = st.one_of(
    st.text(max_size=20), st.sampled_from(["\n# Forged\n", "<script>", "```", "`", "---\n", "license: mit\n", "|", "]("])
)
foreign = st.lists(st.lists(pieces, max_size=6).map("".join), min_size=7, max_size=7)


def damaged(content, done):
    data = bytearray(content)
    for kind, where, what in done:
        at = int(where * len(data))
        if kind == "flip" and data:
            data[at] ^= what
        elif kind == "cut":
            del data[at:]
        elif kind == "zero":
            data[at : at + what] = bytes(len(data[at : at + what]))
        elif kind == "insert":
            data[at:at] = what
        elif kind == "repeat":
            data[at:at] = data[at : at + what]
    return bytes(data)


IMAGES = [*((3, content) for content in pictures()), *tiffs()]
ARCHIVES, WEIGHTS, STATE = list(archives()), list(weights()), run_state()
CONFIG = config()
HEADER_LINES = write_card(PLACE / "export", repo="owner/name").read_text().split("---\n")[1].count("\n")
counts = collections.Counter()


def read_image(content, channels=3):
    for decoder in ("fast", "pillow"):
        views = MultiViewTransform(16, in_chans=channels, decoder=decoder)
        views(content, generator=torch.Generator().manual_seed(0))


def read_archive(name, content):
    folder = PLACE / "data"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / name).write_bytes(content)
    source = open_images(folder / name)
    for index in range(min(len(source), 3)):
        read_image(source[index][0])


def read_export(content):
    (PLACE / "export/config.json").write_bytes(content)
    load_backbone(str(PLACE / "export"))


def read_card(texts):
    """Write the card of a model with foreign texts: what they hold is no heading, no HTML and no line of the header."""
    names = ("command", "commit", "hardware")
    described = json.loads(CONFIG) | {"started_from": {"weights": texts[3], "license": texts[4]}, "training": texts[5]}
    (PLACE / "export/config.json").write_text(json.dumps(described))
    written = write_card(
        PLACE / "export", repo="owner/name", settings={"augment": texts[6]}, **dict(zip(names, texts, strict=False))
    )
    card = written.read_text(encoding="utf-8")
    written.unlink()
    unquoted = re.sub(r"(`+).*?\1", "", re.sub(r"(?ms)^```.*?^```$", "", card))
    assert "<script" not in unquoted and not re.search(r"(?m)^#+ Forged", unquoted), texts
    assert card.split("---\n")[1].count("\n") == HEADER_LINES, texts


def read_file(reader, name, content):
    path = PLACE / name
    path.write_bytes(content)
    reader(path)


def attempt(kind, errors, read, *arguments):
    """Count what comes of it; let what is not documented out."""
    signal.alarm(LIMIT)
    try:
        read(*arguments)
        counts[f"{kind}: read"] += 1
    except errors as error:
        text = str(error)
        if not text or "\n" in text.strip():
            raise AssertionError(f"not one line: {text!r}") from error
        counts[f"{kind}: refused"] += 1
    finally:
        signal.alarm(0)


def once(number, examples, only):
    """Run so many examples of each kind, or of one."""
    tune = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))

    @seed(number)
    @tune
    @given(st.sampled_from(IMAGES), changes)
    def images(file, done):
        attempt("images", ImageError, read_image, damaged(file[1], done), file[0])

    @seed(number)
    @tune
    @given(st.sampled_from(ARCHIVES), changes)
    def sources(file, done):
        attempt("sources", (ValueError, FileNotFoundError), read_archive, file[0], damaged(file[1], done))

    @seed(number)
    @tune
    @given(st.sampled_from(WEIGHTS), changes)
    def weights_files(file, done):
        attempt("weights", WeightsError, read_file, read_weights, file[0], damaged(file[1], done))

    @seed(number)
    @tune
    @given(changes)
    def checkpoints(done):
        attempt("checkpoints", ValueError, read_file, read_checkpoint, "checkpoint.pt", damaged(STATE, done))

    @seed(number)
    @settings(tune, max_examples=examples // 5)
    @given(changes)
    def configs(done):
        attempt("config", (Stop, ValueError, TypeError), read_export, damaged(CONFIG, done))

    @seed(number)
    @tune
    @given(foreign)
    def cards(texts):
        attempt("card", ValueError, read_card, texts)

    tests = {"images": images, "sources": sources, "weights": weights_files, "checkpoints": checkpoints}
    for name, test in (tests | {"configs": configs, "cards": cards}).items():
        if only in ("", name):
            test()


def hang(*_):
    raise AssertionError(f"still reading after {LIMIT} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="images, sources, weights, checkpoints, configs or cards; all if empty")
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, hang)
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    begin, number = time.monotonic(), options.seed
    try:
        while time.monotonic() - begin < 60 * options.minutes:
            once(number, 500, options.only)
            number += 1
            print(f"{sum(counts.values())} files in {time.monotonic() - begin:.0f} s", flush=True)
    finally:
        shutil.rmtree(PLACE)
        print(dict(sorted(counts.items())))


if __name__ == "__main__":
    main()
