"""Streams by `datasets`: each image of a pass once, over processes and workers; what a run says of them."""

import functools
import http.server
import itertools
import threading

import numpy as np
import pytest
import torch
from pictures import encode, write_tar
from PIL import Image
from running import run_processes
from tiny_run import ARGUMENTS, losses, pretrain

from mvmae.data import DataError, ImageStream, MultiViewTransform, is_stream, open_images, open_stream, stream_loader

datasets = pytest.importorskip("datasets")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.posix]  # warnings of datasets and its parts
SHARDS, EACH = 4, 9


@pytest.fixture(autouse=True)
def _no_pause_behind_parquet(monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)  # is for the end of a process


def picture(value):
    return encode(Image.new("RGB", (24, 20), (value, 100, 50)), "PNG")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of grey noise whose red is the number of the image, in WebDataset's form and as Parquet."""
    place = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        numbers = range(shard * EACH, (shard + 1) * EACH)
        members = [(f"{n:03d}.cls", b"%d" % (n % 3)) for n in numbers] + [(f"{n:03d}.png", picture(n)) for n in numbers]
        write_tar(place / f"shard-{shard}.tar", dict(sorted(members)))
        rows = {"label": [n % 3 for n in numbers], "image": [{"bytes": picture(n), "path": None} for n in numbers]}
        features = datasets.Features({"label": datasets.Value("int64"), "image": datasets.Image()})
        (place / "hub").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(place / f"hub/train-{shard:05d}-of-{SHARDS:05d}.parquet")
    return place


@pytest.fixture(scope="module")
def server(folder):
    """The address of a server of that folder."""
    pytest.importorskip("aiohttp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
        handler.func.log_message = lambda *_: None
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
            thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
            thread.start()
            yield f"http://127.0.0.1:{serving.server_port}"
            serving.shutdown()
            thread.join()


def numbers(batches):
    """The numbers of the images, by their red."""
    red = torch.cat([batch.views[:, 0, 0].flatten(1).float().mean(1) for batch in batches])
    return red.round().int().tolist()


def load(stream, batch=6, steps=6, world=1, **options):
    """The batches of all processes, step by step."""
    loading = {"num_steps": steps, "world_size": world, "shuffle_buffer": 10, **options}
    ranks = [stream_loader(stream, MultiViewTransform(16), batch, rank=rank, **loading) for rank in range(world)]
    return list(itertools.chain(*zip(*ranks, strict=True)))


@pytest.mark.parametrize("kind", ["http", "file", "parquet", "hub"])
def test_a_pass_over_any_kind_of_stream_holds_each_image_once_in_an_order_of_its_own(kind, folder, request):
    server = request.getfixturevalue("server") if kind in ("http", "parquet") else ""
    shards = f"shard-{{0..{SHARDS - 1}}}.tar"
    tables = f"hub/train-0000{{0..3}}-of-0000{SHARDS}.parquet"
    data = {"http": f"{server}/{shards}", "file": f"file://{folder}/{shards}", "parquet": f"{server}/{tables}"}
    data |= {"hub": f"hfids/{folder}/hub"}
    stream = open_stream(data[kind])
    batches = load(stream, steps=12)
    first, second = numbers(batches[:6]), numbers(batches[6:])
    assert sorted(first) == sorted(second) == list(range(SHARDS * EACH)) and first != second != sorted(first)
    assert len(set(batches[0].names)) == 6 and batches[0].views.shape == (6, 2, 3, 16, 16) and not batches[0].bad
    assert numbers(load(stream)) == first and numbers(load(stream, seed=1)) != first
    kept = stream.first(5)
    assert len(kept) == 5 and isinstance(kept.image(0), bytes) and "\n" not in stream.describe()
    assert f"{SHARDS} shards" in stream.describe() and stream.fingerprint == open_stream(data[kind]).fingerprint


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (1, 9), (2, 0), (3, 1), (8, 0)])
def test_processes_and_workers_share_a_pass_also_where_there_are_fewer_shards(folder, world, workers):
    stream = open_stream(f"file://{folder}/shard-{{0..{SHARDS - 1}}}.tar")
    share = SHARDS * EACH // world
    size = world if world == 8 else world * share if workers < 2 else 1  # one batch a process is a pass, or one image a worker
    batches = load(stream, size, SHARDS * EACH // size, world, num_workers=workers)
    seen = numbers(batches)
    if world == 8:  # 36 images are not shared alike by 8
        assert len(seen) == len(set(seen)) == 32
    else:
        assert sorted(seen) == list(range(SHARDS * EACH))


def test_a_resumed_run_goes_on_with_a_new_pass_and_says_so(folder, caplog):
    stream = open_stream(f"file://{folder}/shard-{{0..{SHARDS - 1}}}.tar")
    whole = numbers(load(stream, steps=9))
    assert not caplog.messages
    rest = numbers(load(stream, steps=9, start_step=2))
    assert "step 3 begins a new pass" in caplog.text
    assert len(rest) == 7 * 6 and sorted(rest[:36]) == list(range(SHARDS * EACH)) and rest[:6] not in (whole[:6], whole[12:18])


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_are_named_and_replaced_up_to_max_bad(tmp_path, workers):
    members = {f"{i}.png": picture(i) for i in range(9)} | {"cut.png": picture(1)[:40], "page.png": b"<html>"}
    write_tar(tmp_path / "a.tar", members)
    stream = open_stream(f"file://{tmp_path}/a.tar")
    batches = load(stream, 3, 6, num_workers=workers, bad_file=tmp_path / "bad.txt")
    assert sorted(numbers(batches)) == sorted([*range(9)] * 2) and all(len(batch.views) == 3 for batch in batches)
    named = [line.split("\t")[0] for line in (tmp_path / "bad.txt").read_text().splitlines()]
    assert sorted(named) == ["a.tar/cut", "a.tar/page"]
    with pytest.raises(DataError, match="2 bad images, more than the 1 allowed"):
        load(stream, 3, 9, num_workers=workers, max_bad=1)
    write_tar(tmp_path / "b.tar", {f"{i}.png": b"<html>" for i in range(30)})
    with pytest.raises(DataError, match="10 images in a row cannot be used"):
        load(open_stream(f"file://{tmp_path}/b.tar"), num_workers=workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_breaks_ends_in_one_line(tmp_path, workers):
    def rows(shards):
        for shard in shards:
            yield from ({"image": picture(i)} for i in range(4))
            if shard == 1:
                raise ConnectionError("gone\nfrom https://user:word@host/a.tar?key=secret")

    stream = ImageStream(datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1]}), "rows")
    with pytest.raises(DataError, match="cannot be read on: .*gone from https://host/a.tar") as caught:
        load(stream, 2, 9, num_workers=workers, shuffle_buffer=1)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value) and "word" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("pipe:curl http://host/a.tar", "cannot be opened: .*pipe"),
        ("https://user:word@host/a.zip?key=secret", "got https://host/a.zip$"),
        ("file:///nowhere/a.tar", "cannot be opened: .*nowhere"),
        ("hfids//nowhere", "cannot be opened"),
    ],
)
def test_other_names_are_refused(data, words):
    assert is_stream(data)
    with pytest.raises(ValueError, match=words):
        open_stream(data)


def test_lists_are_no_streams_and_scripts_that_need_lists_say_so(tmp_path):
    assert not any(map(is_stream, ["sample", "folder/a.tar", "shards/{000..012}.tar", "torch/cifar10:folder", "hfds/name"]))
    with pytest.raises(ValueError, match="a stream, of which images have no numbers"):
        open_images("http://host/a.tar?key=secret")
    write_tar(tmp_path / "a.tar", {"a.txt": b"text"})
    with pytest.raises(ValueError, match="must have a column of images, got .*txt"):
        open_stream(f"file://{tmp_path}/a.tar")
    with pytest.raises(ValueError, match="batch size must be a positive multiple"):
        stream_loader(None, None, 3, num_steps=1, world_size=2)


def test_the_length_that_hugging_face_knows_is_that_of_an_epoch(folder):
    dataset = datasets.load_dataset(str(folder / "hub"), split="train", streaming=True)
    assert ImageStream(dataset, "hub").length is None
    dataset.info.splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=36)})
    assert ImageStream(dataset, "hub").length == 36


# Scripts

STEPS = ["--steps", 8, "--max-steps", 6, "--save-every", 3, "--workers", 1]


@pytest.mark.parametrize("place", ["server", "folder"])
def test_a_run_on_a_stream_says_what_it_trains_on_and_resumes(place, request, tmp_path):
    base = {"server": str, "folder": lambda path: f"file://{path}"}[place](request.getfixturevalue(place))
    data = f"{base}/shard-{{0..{SHARDS - 1}}}.tar"
    result = pretrain(tmp_path, data, *STEPS)
    assert result.code == 0 and f"{SHARDS} shards" in result.out and "8 steps of 8 images" in result.out, result
    assert {"encoder", "curves.png", "reconstructions.png"} <= {path.name for path in (tmp_path / "run").iterdir()}
    again = pretrain(tmp_path, data, *STEPS, "--max-steps", 8, "--resume")
    assert again.code == 0 and "step 7 begins a new pass" in again.err + again.out, again
    assert list(losses(tmp_path)) == list(range(1, 9)) and np.isfinite([*losses(tmp_path).values()]).all()


def test_two_processes_share_a_stream(folder, tmp_path):
    given = ["--data", f"file://{folder}/shard-{{0..3}}.tar", "--output-dir", "run", *ARGUMENTS, *STEPS]
    results = run_processes("pretrain.py", *given, folder=tmp_path)
    assert [result.code for result in results] == [0, 0], results
    assert list(losses(tmp_path)) == list(range(1, 7))


def test_what_a_stream_needs_is_said_in_one_line(folder, tmp_path):
    result = pretrain(tmp_path, f"file://{folder}/shard-0.tar")
    assert result.code == 2 and "has a length that is not known: add --steps N" in result.err, result
    assert result.err.count("\n") == 1
