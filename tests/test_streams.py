import functools
import gzip
import http.server
import io
import random
import re
import struct
import tarfile
import threading
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import run_processes, run_script
from tiny_run import ARGUMENTS, assert_identical, end_of, losses, pretrain
from torch.utils.data import IterableDataset

from mvmae.data import (
    MultiViewTransform,
    StreamedViews,
    StreamSampler,
    is_stream,
    make_loader,
    open_images,
    open_stream,
    remote,
    shards,
    streams,
)
from mvmae.data.sampling import DataError

SHARDS, EACH = 7, 13
PAUSES = (0.01, 0.02, 0.03)


def picture(value, size=(24, 20), kind="png"):
    file = io.BytesIO()
    Image.new("RGB", size, (value % 256, 100, 50)).save(file, kind)
    return file.getvalue()


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


class Server:
    """Serves a folder on this machine; `fault(path, first byte, how often it was asked for)` is what befalls an answer."""

    def __init__(self, folder, ranges=True):
        self.asked, self.fault, ended = [], lambda *_: "", threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler):
                path = Path(folder, handler.path.partition("?")[0].lstrip("/"))
                first = int(handler.headers.get("Range", "bytes=0-")[6:-1]) if ranges else 0
                self.asked.append((path.name, first))
                fault = self.fault(path.name, first, sum(name == path.name for name, _ in self.asked))
                if fault.isdigit() or not path.exists():
                    return handler.send_error(int(fault or 404))
                content = path.read_bytes()
                handler.send_response(206 if first else 200)
                handler.send_header("Content-Length", str(len(content) - first))
                if first:
                    handler.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
                handler.end_headers()
                if fault == "stall":
                    handler.wfile.write(content[first : first + 700])
                    ended.wait(5)
                    return None
                half = (len(content) - first) // 2
                handler.wfile.write(content[first : first + half if fault == "cut" else None])
                return None

            def log_message(handler, *_):
                pass

        self._server, self._ended = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler), ended
        self._server.handle_error = lambda *_: None  # a client that has gone
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self):
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(scope="module", autouse=True)
def _no_proxy():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards by the library `webdataset`, with labels and texts beside the images."""
    webdataset = pytest.importorskip("webdataset")
    place = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        with webdataset.TarWriter(str(place / f"shard-{shard:03d}.tar")) as writer:
            for i in range(EACH):
                pixels = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels).resize((48, 40)).save(file, "jpeg")
                writer.write({"__key__": f"{shard}-{i:04d}", "jpg": file.getvalue(), "cls": i % 3, "json": {"text": "x"}})
    return place


@pytest.fixture(params=[True, False], ids=["ranges", "no-ranges"])
def server(request, folder):
    with closing(Server(folder, request.param)) as running:
        yield running


@pytest.fixture
def ranged(folder):
    with closing(Server(folder)) as running:
        yield running


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", PAUSES)
    monkeypatch.setattr(remote, "TIMEOUT", 0.5)


def urls(server):
    return f"{server.url}/shard-{{000..{SHARDS - 1:03d}}}.tar"


def keys(sampler):
    return [[(key.epoch, key.number) for key in step] for step in sampler]


def passes(stream, batch=4, world=1, steps=100, seed=0):
    """The images of each pass that all processes have gone through, in the order of the steps."""
    per_rank = [
        keys(StreamSampler(stream, batch * world, num_steps=steps, rank=r, world_size=world, seed=seed)) for r in range(world)
    ]
    complete = min(images[-1][-1][0] for images in per_rank)
    return [[n for images in per_rank for step in images for e, n in step if e == epoch] for epoch in range(complete)]


def everything(stream, counts):
    return sorted(shard * 2**32 + number for shard, count in enumerate(counts) for number in range(count))


# ------------------------------------------------------------------------------------------------------------- the order


def test_each_pass_over_webdatasets_shards_holds_each_image_once_in_an_order_of_its_own(server):
    stream = open_stream(urls(server), buffer=20)
    first, second, *_ = passes(stream)
    assert sorted(first) == sorted(second) == everything(stream, [EACH] * SHARDS) and first != second
    assert passes(stream)[0] == first and passes(stream, seed=1)[0] != first
    assert stream.name(first[0]).endswith(f".tar#{first[0] % 2**32}")


def test_images_of_several_shards_are_mixed_within_a_block(folder):
    first = passes(open_stream(f"file://{folder}/shard-{{000..006}}.tar", buffer=20))[0]
    assert first[:20] != sorted(first[:20]) and len({number >> 32 for number in first[:20]}) == streams.AT_ONCE
    plain = passes(open_stream(f"file://{folder}/shard-000.tar", buffer=1))[0]
    assert plain == sorted(plain)  # a buffer of one image does not shuffle


@pytest.mark.parametrize("world", [2, 3, 4, 7, 8, 20])
def test_processes_share_a_pass_also_where_there_are_fewer_shards_than_processes(folder, world):
    stream = open_stream(f"file://{folder}/shard-{{000..006}}.tar", buffer=8)
    for images in passes(stream, batch=1, world=world, steps=3 * SHARDS * EACH // world + 3)[:2]:
        assert sorted(images) == everything(stream, [EACH] * SHARDS)


def test_processes_share_shards_of_unequal_sizes(tmp_path):
    counts = [1, 30, 2, 2, 9]
    for shard, count in enumerate(counts):
        write_tar(tmp_path / f"{shard}.tar", [(f"{i}.png", picture(i)) for i in range(count)])
    stream = open_stream(f"file://{tmp_path}/{{0..4}}.tar", buffer=6)
    for world in (1, 2, 3, 9):
        images = passes(stream, batch=1, world=world, steps=60)[0]
        assert sorted(images) == everything(stream, counts), world


def test_views_are_the_same_for_any_number_of_workers(ranged):
    stream = open_stream(urls(ranged), buffer=20)

    def batches(workers):
        views = StreamedViews(stream, MultiViewTransform(16), seed=3)
        return list(make_loader(views, StreamSampler(stream, 8, num_steps=14, seed=3), num_workers=workers))

    alone, several = batches(0), batches(2)
    assert len(alone) == 14
    for one, other in zip(alone, several, strict=True):
        assert torch.equal(one.views, other.views) and torch.equal(one.indices, other.indices)
    pixels = {int(n): v for batch in alone for n, v in zip(batch.indices, batch.views, strict=True)}
    again = [
        v for batch in alone for n, v in zip(batch.indices, batch.views, strict=True) if not torch.equal(v, pixels[int(n)])
    ]
    assert again  # the same image in the next pass has other crops


# ------------------------------------------------------------------------------------------------------------------ resume


def state_after(stream, cut, world=1):
    """What a checkpoint holds of the samplers of all processes after so many steps."""
    samplers = [StreamSampler(stream, 4 * world, rank=rank, world_size=world) for rank in range(world)]
    steps, places = [iter(sampler) for sampler in samplers], []
    for step in range(1, cut + 1):
        places = []
        for sampler, coming in zip(samplers, steps, strict=True):
            next(coming)
            sampler.advance(step, functools.partial(note, places))
    for coming in steps:
        next(coming)  # what a loader has fetched ahead does not count
        coming.close()
    assert torch.equal(samplers[-1].state_dict()["places"], torch.tensor(places[-1:]))
    return {"stream": stream.fingerprint, "places": torch.tensor(places)}


def note(places, own):
    places.append(own)
    return [own]


def resumed(stream, cut, steps, world=1, rank=0):
    """The steps behind `cut`, in a process that begins there with the state that was kept then."""
    sampler = StreamSampler(stream, 4 * world, num_steps=steps, rank=rank, world_size=world)
    sampler.load_state_dict(state_after(stream, cut, world))
    sampler.start_step = cut
    return keys(sampler)


@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_sampler_goes_on_with_the_very_next_image(server, world):
    stream, steps = open_stream(urls(server), buffer=20), 50
    for rank in range(world):
        whole = keys(StreamSampler(stream, 4 * world, num_steps=steps, rank=rank, world_size=world))
        for cut in (1, 2, 5, 6, 22, 23, 24, 49):  # within blocks, at their ends, around the end of the first pass
            assert resumed(stream, cut, steps, world, rank) == whole[cut:], cut


def test_a_resumed_reader_begins_where_its_block_begins(ranged):
    stream = open_stream(urls(ranged), buffer=8)
    state = state_after(stream, 21)  # of 22.75 steps in a pass
    sampler = StreamSampler(stream, 4, num_steps=22)
    sampler.load_state_dict(state)
    sampler.start_step = 21
    ranged.asked.clear()
    [step] = keys(sampler)
    assert len(step) == 4 and 1 <= len(ranged.asked) <= 2 * streams.AT_ONCE
    assert ranged.asked[0][1] > 5000


def test_another_number_of_processes_goes_on_with_the_next_pass(folder, caplog):
    stream = open_stream(f"file://{folder}/shard-{{000..006}}.tar", buffer=8)
    two = StreamSampler(stream, 4, num_steps=5, world_size=2)
    for step, _ in enumerate(two, 1):
        two.advance(step, lambda own: [own, own])
    one = StreamSampler(stream, 4, num_steps=40)
    one.load_state_dict(two.state_dict())
    assert "1 processes instead of 2" in caplog.text
    images = [key for step in keys(one) for key in step]
    assert images[0][0] == 1 and sorted(n for e, n in images if e == 1) == everything(stream, [EACH] * SHARDS)


def test_another_stream_begins_anew(folder):
    old, new = (open_stream(f"file://{folder}/shard-{{000..{last}}}.tar", buffer=8) for last in ("006", "005"))
    assert old.fingerprint != new.fingerprint
    sampler = StreamSampler(old, 4, num_steps=3)
    for step, _ in enumerate(sampler, 1):
        sampler.advance(step)
    other = StreamSampler(new, 4, num_steps=3)
    other.load_state_dict(sampler.state_dict())
    assert keys(other) == keys(StreamSampler(new, 4, num_steps=3))


def test_the_same_shards_elsewhere_are_the_same_stream(ranged, folder):
    there, here = open_stream(urls(ranged)), open_stream(f"file://{folder}/shard-{{000..006}}.tar")
    assert there.fingerprint == here.fingerprint


# ----------------------------------------------------------------------------------------------- servers that fail, and data


def test_a_server_that_fails_now_and_then_loses_nothing(server, impatient):
    expected = passes(open_stream(urls(server), buffer=20))[0]
    faults = {1: "500", 2: "cut", 4: "stall", 5: "503", 7: "cut"}
    server.asked.clear()
    server.fault = lambda path, first, times: faults.get(times, "")
    assert passes(open_stream(urls(server), buffer=20), steps=24)[0] == expected
    assert len(server.asked) > 3 * SHARDS


@pytest.mark.parametrize(
    ("fault", "words", "asked"),
    [
        ("500", "the server answers 500 .*, tried 4 times", 4),
        ("stall", "the server answers 504 .*, tried 4 times", 4),  # the first answer has some bytes
        ("403", "the server answers 403 Forbidden$", 1),
        ("404", "the server answers 404 Not Found$", 1),
    ],
)
def test_a_server_that_goes_on_failing_ends_in_one_line_that_names_the_shard(ranged, impatient, fault, words, asked):
    stream = open_stream(urls(ranged) + "?signature=secret", buffer=20)
    later = "504" if fault == "stall" else fault
    ranged.fault = lambda path, first, times: "" if path != "shard-003.tar" else later if first else fault
    with pytest.raises(DataError, match=words) as caught:
        passes(stream)
    assert "/shard-003.tar cannot be read from byte" in str(caught.value) and "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert sum(path == "shard-003.tar" for path, _ in ranged.asked) == asked


def test_no_server_at_all_ends_in_one_line(impatient):
    with closing(Server(".")) as gone:
        pass
    with pytest.raises(DataError, match=r"/a\.tar cannot be read from byte 0 on: .*refused, tried 4 times"):
        open_stream(f"{gone.url}/a.tar").first(1)


def test_a_file_that_changes_while_it_is_read_is_not_mixed_with_the_old_one(tmp_path, impatient):
    write_tar(tmp_path / "a.tar", [(f"{i}.png", picture(i)) for i in range(5000)])
    new = (tmp_path / "a.tar").read_bytes() + b"\0" * 512
    with closing(Server(tmp_path)) as server:

        def change(path, first, times):
            if first:
                (tmp_path / "a.tar").write_bytes(new)
            return "cut"

        server.fault = change
        with pytest.raises(DataError, match=r"a\.tar has changed while it was read"):
            passes(open_stream(f"{server.url}/a.tar", buffer=8), steps=1300)


def bomb(side):
    """A PNG of a few bytes whose header says that it has side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def load(stream, batch=8, steps=2, workers=0, **options):
    views = StreamedViews(stream, MultiViewTransform(16), max_bad=options.pop("max_bad", 100))
    return list(make_loader(views, StreamSampler(stream, batch, num_steps=steps), num_workers=workers, **options))


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_members_and_bombs_are_listed_and_replaced_up_to_max_bad(tmp_path, workers, monkeypatch):
    good = [(f"{i}.png", picture(i)) for i in range(13)]
    members = [*good, ("cut.png", picture(1)[:40]), ("bomb.png", bomb(60_000)), ("page.jpg", b"<html>")]
    write_tar(tmp_path / "a.tar", members)
    stream = open_stream(f"file://{tmp_path}/a.tar", buffer=16)
    batches = load(stream, workers=workers, bad_file=tmp_path / "bad.txt")
    assert all(batch.views.shape == (8, 2, 3, 16, 16) for batch in batches)
    used = [int(index) for batch in batches for index in batch.indices]
    assert set(used) == set(range(13)) and len(used) == 16  # each good image, and three of them once more
    named = dict(line.split("\t") for line in (tmp_path / "bad.txt").read_text().splitlines())
    assert {name.rpartition("/")[2] for name in named} == {"cut.png", "bomb.png", "page.jpg"}
    assert "pixels" in next(reason for name, reason in named.items() if "bomb" in name)
    with pytest.raises(DataError, match="3 bad images, more than the 2 allowed"):
        load(stream, workers=workers, max_bad=2)
    views = [v for batch in batches for v in batch.views]
    assert len({tuple(v.flatten().tolist()) for v in views}) <= 13


def test_a_member_too_large_for_an_image_is_not_read(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", [("large.png", b"\0" * 3_000_000), *((f"{i}.png", picture(i)) for i in range(7))])
    monkeypatch.setattr(shards, "most_bytes", lambda: 2_000_000)
    stream = open_stream(f"file://{tmp_path}/a.tar")
    bad = [bad for batch in load(stream, steps=1) for bad in batch.bad]
    assert [b.name.rpartition("/")[2] for b in bad] == ["large.png"] and "3000000 bytes, more than the 2000000" in bad[0].reason


@pytest.mark.parametrize("damage", ["cut", "no mark", "header", "page"])
def test_a_damaged_shard_is_a_bad_image_and_its_whole_members_are_used(tmp_path, damage):
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", [(f"{i}.png", picture(i)) for i in range(9)])
    content = (tmp_path / "1.tar").read_bytes()
    with tarfile.open(tmp_path / "1.tar") as tar:
        sixth, last = tar.getmembers()[5].offset, tar.getmembers()[8].offset + 1024
    damaged = {
        "cut": content[: sixth + 520],
        "no mark": content[:last],
        "header": content[:sixth] + b"x" * 512 + content[sixth + 512 :],
        "page": b"<html>sign in" * 100,
    }[damage]
    whole = {"cut": 5, "no mark": 9, "header": 5, "page": 0}[damage]
    (tmp_path / "1.tar").write_bytes(damaged)
    stream = open_stream(f"file://{tmp_path}/{{0..1}}.tar", buffer=30)
    batches = load(stream, batch=5, steps=(9 + whole + 1) // 5)
    bad = [bad for batch in batches for bad in batch.bad]
    first = passes(stream, batch=1, steps=40)[0]
    assert sorted(first) == everything(stream, [9, whole + 1])
    assert f"its {whole} whole images are used, the rest is lost" in (bad or load(stream, steps=9)[-1].bad)[0].reason
    for cut in range(1, 9):  # a position behind the damage stays behind it
        assert resumed(stream, cut, 9) == keys(StreamSampler(stream, 4, num_steps=9))[cut:]


def test_compressed_shards_are_read_and_resumed(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar.gz", [(f"{i}.png", picture(i)) for i in range(9)], "w:gz")
    stream = open_stream(f"file://{tmp_path}/{{0..1}}.tar.gz", buffer=4)
    assert sorted(passes(stream)[0]) == everything(stream, [9, 9])
    assert resumed(stream, 3, 9) == keys(StreamSampler(stream, 4, num_steps=9))[3:]
    cut = gzip.compress(gzip.decompress((tmp_path / "1.tar.gz").read_bytes()))[:-200]
    (tmp_path / "1.tar.gz").write_bytes(cut)
    assert any("the rest is lost" in bad.reason for batch in load(stream, batch=4, steps=5) for bad in batch.bad)


def test_links_and_long_names_in_a_shard(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for i in range(8):
            header = tarfile.TarInfo("é" * 120 + f"/{i}.png")
            header.size = len(picture(i))
            tar.addfile(header, io.BytesIO(picture(i)))
    stream = open_stream(f"file://{tmp_path}/a.tar", buffer=3)
    assert sorted(passes(stream)[0]) == list(range(8))
    assert resumed(stream, 1, 4) == keys(StreamSampler(stream, 4, num_steps=4))[1:]
    assert stream.first(1).name(0).endswith("é/0.png")


# ------------------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("pipe:curl http://host/a.tar", "pipe: would run a shell command"),
        ("s3://bucket/a.tar", "must begin with http://, https://, file:// or hfids/, got s3://bucket/a.tar"),
        ("http://host/a.zip", "must be of tar files .*got http://host/a.zip"),
        ("https://user:word@host/a.zip?key=secret", "got https://host/a.zip$"),
    ],
)
def test_other_names_are_refused(data, words):
    assert is_stream(data)
    with pytest.raises(ValueError, match=words):
        open_stream(data)


def test_lists_are_no_streams_and_scripts_that_need_lists_say_so(tmp_path):
    assert not any(map(is_stream, ["sample", "folder/a.tar", "shards/{000..012}.tar", "torch/cifar10:folder", "hfds/name"]))
    with pytest.raises(ValueError, match=r"http://host/a.tar is a stream, which pretrain.py and adapt.py take"):
        open_images("http://host/a.tar?key=secret")
    with pytest.raises(DataError, match="a.tar cannot be read: No such file"):
        open_stream(f"file://{tmp_path}/a.tar").first(1)
    write_tar(tmp_path / "a.tar", [("a.txt", b"text")])
    with pytest.raises(ValueError, match="no image at the beginning of"):
        open_stream(f"file://{tmp_path}/a.tar").first(1)


# --------------------------------------------------------------------------------------------------- Hugging Face, iterables


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    place = tmp_path_factory.mktemp("parquet")
    for shard in range(5):
        rows = {"label": [i % 3 for i in range(11)], "image": [Image.new("RGB", (24, 20), (i, shard, 0)) for i in range(11)]}
        features = datasets.Features({"label": datasets.Value("int64"), "image": datasets.Image()})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(place / f"train-{shard:05d}-of-00005.parquet")
    return place


@pytest.mark.filterwarnings("ignore")  # of datasets
def test_data_sets_of_hugging_face_are_streams_by_name_and_as_objects(parquet):
    datasets = pytest.importorskip("datasets")
    named = open_stream(f"hfids/{parquet}", buffer=8)
    files = sorted(map(str, parquet.glob("*.parquet")))
    passed = open_stream(datasets.load_dataset("parquet", data_files=files, split="train", streaming=True), buffer=8)
    for stream in (named, passed):
        assert len(stream.shards.names) == 5
        for world in (1, 2, 8):
            assert sorted(passes(stream, 1, world, 70)[0]) == everything(stream, [11] * 5)
        for cut in (1, 3, 9, 13, 14, 20):
            assert resumed(stream, cut, 21) == keys(StreamSampler(stream, 4, num_steps=21))[cut:]
        [batch] = load(stream, steps=1)
        assert batch.views.shape == (8, 2, 3, 16, 16) and not batch.bad
        assert isinstance(stream.first(1).image(0), bytes)  # not decoded in the process that reads
    with pytest.raises(ValueError, match=r"hfids/.*:other cannot be opened: .*other"):
        open_stream(f"hfids/{parquet}:other")


@pytest.mark.filterwarnings("ignore")
def test_the_length_that_hugging_face_knows_is_that_of_an_epoch(parquet):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.load_dataset(str(parquet), split="train", streaming=True)
    assert open_stream(dataset).length is None
    info = datasets.SplitInfo("train", num_examples=55)
    dataset.info.splits = datasets.SplitDict({"train": info})
    assert open_stream(dataset).length == 55


@pytest.mark.filterwarnings("ignore")
def test_a_data_set_whose_connection_fails_is_read_on_and_an_error_of_another_kind_names_the_shard(parquet, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(shards, "PAUSES", PAUSES)
    fails = iter([ConnectionError("gone")] * 3 + [None] * 30 + [TimeoutError("slow")] + [None] * 1000)

    def rows(numbers):
        for number in numbers:
            if error := next(fails):
                raise error
            yield {"image": picture(number)}

    dataset = datasets.IterableDataset.from_generator(rows, gen_kwargs={"numbers": list(range(20))})
    stream = open_stream(dataset, buffer=6)
    assert len(stream.shards.names) == 20 and sorted(passes(stream)[0]) == everything(stream, [1] * 20)
    fails = iter([KeyError("column")] * 100)
    with pytest.raises(DataError, match=r"\[\d+\] cannot be read from image 0 on: KeyError"):
        passes(stream)


class Numbers(IterableDataset):
    def __init__(self, make, count=37):
        self.make, self.count, self.epochs = make, count, []

    def __iter__(self):
        return map(self.make, range(self.count))


@pytest.mark.parametrize(
    "make",
    [
        picture,
        lambda i: (picture(i), i),
        lambda i: Image.new("RGB", (24, 20), (i, 0, 0)),
        lambda i: np.full((20, 24, 3), i, np.uint8),
        lambda i: {"text": "x", "jpg": picture(i)},
        lambda i: [torch.full((3, 20, 24), i, dtype=torch.uint8), i],
    ],
    ids=["bytes", "pair", "pillow", "array", "columns", "tensor"],
)
def test_iterables_of_images_are_streams(make):
    stream = open_stream(Numbers(make), buffer=10)
    for world in (1, 3):
        assert sorted(passes(stream, 2, world)[0]) == list(range(37))
    for cut in (1, 3, 9, 10):
        assert resumed(stream, cut, 12) == keys(StreamSampler(stream, 4, num_steps=12))[cut:]
    for workers in (0, 1):
        assert [batch.bad for batch in load(stream, workers=workers)] == [[], []]


def test_what_can_be_read_once_is_refused():
    with pytest.raises(ValueError, match=r"must start anew with each iter\(\), got a generator"):
        open_stream(picture(i) for i in range(9))


def test_an_iterable_is_told_the_pass():
    class Told(Numbers):
        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    told = Told(picture)
    assert open_stream(told).length is None and open_stream([picture(1)]).length == 1
    passes(open_stream(told, buffer=10), steps=30)
    assert told.epochs[:3] == [0, 1, 2]


def test_an_iterable_that_fails_and_one_that_is_smaller_than_a_batch_end_in_one_line():
    stream = open_stream(Numbers(lambda i: picture(1 // (5 - i))))
    with pytest.raises(DataError, match="Numbers cannot be read from about image 4 on: ZeroDivisionError"):
        passes(stream)
    with pytest.raises(DataError, match="Numbers and what follows hold 3 images for process 0, and its part of a batch is 4"):
        passes(open_stream(Numbers(picture, 3)))
    with pytest.raises(DataError, match="hold 0 images for process 0"):
        passes(open_stream([]))
    odd = open_stream(Numbers(lambda i: {"text": "x"} if i == 3 else picture(i)))
    assert [bad for batch in load(odd, steps=4) for bad in batch.bad] == [("Numbers#3", "no image among the columns text")]


# ----------------------------------------------------------------------------------------------------------------- memory


class Counted:
    """An array whose copies alive are counted."""

    alive = most = 0
    lock = threading.Lock()

    def __init__(self):
        with Counted.lock:
            Counted.alive += 1
            Counted.most = max(Counted.most, Counted.alive)

    def __del__(self):
        with Counted.lock:
            Counted.alive -= 1


@pytest.mark.parametrize("by_bytes", [False, True])
def test_no_more_than_two_blocks_are_in_memory(by_bytes, monkeypatch):
    Counted.most = 0
    stream = open_stream(Numbers(lambda i: Counted(), 3000), buffer=1000 if by_bytes else 50)
    if by_bytes:
        monkeypatch.setattr(streams, "MOST_BYTES", 5000)  # an image of no known size counts as 100
    for _ in StreamSampler(stream, 4, num_steps=700):
        assert Counted.most <= 2 * 50 + 10
    assert Counted.most > 60


# ----------------------------------------------------------------------------------------------------------------- scripts

STEPS = ["--max-steps", 12, "--save-every", 5, "--images-per-epoch", 32, "--shuffle-buffer", 20]


@pytest.fixture(scope="module")
def uncut(tmp_path_factory, folder):
    """A run of twelve steps over HTTP in one go."""
    place = tmp_path_factory.mktemp("uncut")
    with closing(Server(folder)) as server:
        result = pretrain(place, urls(server), *STEPS, "--workers", 0)
    assert result.code == 0, result.err
    return place, result


def test_a_run_on_a_stream_says_what_it_trains_on_and_leaves_its_files(uncut):
    place, result = uncut
    assert "a stream of 7 shards" in result.out and "of which 32 images count as an epoch" in result.out
    assert {"encoder", "curves.png", "reconstructions.png"} <= {path.name for path in (place / "run").iterdir()}
    assert list(losses(place)) == list(range(1, 13))


@pytest.mark.posix
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_at_any_step_and_resumed_ends_bit_identical(uncut, ranged, tmp_path, workers):
    step = random.SystemRandom().randint(1, 11)
    options = [*STEPS, "--workers", workers]
    cut = pretrain(tmp_path, urls(ranged), *options, fault=f"kill@{step}")
    assert cut.code == -9, (step, cut)
    ranged.fault = lambda path, first, times: "cut" if times % 5 == 0 else ""
    result = pretrain(tmp_path, urls(ranged), *options, "--resume")
    assert result.code == 0, (step, result.err)
    assert_identical(end_of(tmp_path), end_of(uncut[0]))
    assert losses(tmp_path) == losses(uncut[0])


@pytest.mark.posix
def test_two_processes_share_a_stream_and_resume_and_one_goes_on_alone(folder, tmp_path):
    given = ["--data", f"file://{folder}/shard-{{000..006}}.tar", "--output-dir", "run", *ARGUMENTS, *STEPS, "--workers", 1]
    for place in ("whole", "cut"):
        (tmp_path / place).mkdir()
    whole = run_processes("pretrain.py", *given, folder=tmp_path / "whole")
    assert [result.code for result in whole] == [0, 0], whole
    cut = run_processes("pretrain.py", *given, folder=tmp_path / "cut", faults=["kill@7", "kill@7"])
    assert [result.code for result in cut] == [-9, -9]
    again = run_processes("pretrain.py", *given, "--resume", folder=tmp_path / "cut")
    assert [result.code for result in again] == [0, 0], again
    assert_identical(end_of(tmp_path / "cut"), end_of(tmp_path / "whole"))
    places = end_of(tmp_path / "cut")["stream"]["places"]
    assert len(places) == 2 and not torch.equal(places[0], places[1])
    alone = run_script("pretrain.py", *given, "--max-steps", 14, "--resume", folder=tmp_path / "cut")
    assert alone.code == 0 and "1 processes instead of 2: the stream goes on with its next pass" in alone.err, alone


def test_a_server_that_is_gone_ends_a_run_in_one_line_with_the_last_step_saved(folder, tmp_path):
    with closing(Server(folder)) as server:
        # seven answers for the first images and what tells the stream from others, four for the shards that are read at first
        server.fault = lambda path, first, times: "404" if len(server.asked) > 11 else ""
        result = pretrain(tmp_path, urls(server), *STEPS, "--shuffle-buffer", 4, "--workers", 1)
    assert result.code not in (0, -9)
    assert re.search(r"shard-00\d\.tar cannot be read from byte 0 on: the server answers 404", result.err), result
    assert "Traceback" not in result.err
    step = end_of(tmp_path)["step"]
    assert 1 <= step < 12 and f"step {step} is saved" in result.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "has a length that is not known: add --images-per-epoch N"),
        (["--images-per-epoch", 32, "--crops-per-image", 2], "--crops-per-image must be 1 for a stream, got 2"),
    ],
)
def test_what_a_stream_needs_is_said_in_one_line(folder, tmp_path, arguments, words):
    result = pretrain(tmp_path, f"file://{folder}/shard-000.tar", *arguments)
    assert result.code == 2 and words in result.err and result.err.count("\n") == 1, result


def test_the_images_of_an_epoch_can_be_fewer_than_a_list_holds(images, tmp_path):
    result = pretrain(tmp_path, images, "--images-per-epoch", 16, "--epochs", 3, "--workers", 0)
    assert result.code == 0 and list(losses(tmp_path)) == list(range(1, 7)), result
    assert "of which 16 images count as an epoch" in result.out


def test_adapt_takes_a_stream_and_looks_at_its_first_images(uncut, folder, tmp_path):
    arguments = ["--encoder", uncut[0] / "run", "--data", f"file://{folder}/shard-{{000..006}}.tar", "--output-dir", "run"]
    arguments += ["--image-size", 32, "--decoder-dim", 16, "--decoder-depth", 1, "--decoder-heads", 2, "--batch-size", 8]
    arguments += ["--epochs", 2, "--freeze-epochs", 1, "--warmup-epochs", 1, "--workers", 0, "--images-per-epoch", 16]
    arguments += ["--monitor-images", 40, "--mean", "auto", "--std", "auto", "--device", "cpu"]
    result = run_script("adapt.py", *arguments, folder=tmp_path)
    assert result.code == 0, result
    assert "features are measured on 40 training images (a stream: its first ones, and no image is held out)" in result.out
