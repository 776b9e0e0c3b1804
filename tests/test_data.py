"""Loading: the same samples whatever the workers, the start and the processes; every trouble in one line."""

import gc
import multiprocessing
import multiprocessing.synchronize
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvmae.data import (
    DataError,
    FileSource,
    ImageError,
    ImageSource,
    Loader,
    MultiViewDataset,
    MultiViewTransform,
    StepSampler,
    open_images,
    sample_seed,
)

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores


class Arrays(ImageSource):
    """Noise images, some of them bad."""

    def __init__(self, count=13, bad=(), hook=None):
        super().__init__([b"image %d" % i for i in range(count)])
        self.bad, self.hook = set(bad), hook

    def image(self, index):
        if self.hook:
            self.hook(index)
        if index in self.bad:
            raise ImageError(self.name(index), f"broken {index}")
        return np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)


def loader(source, *, batch=4, seed=0, num_steps=6, start_step=0, rank=0, world_size=1, max_bad=100, **options):
    dataset = MultiViewDataset(source, MultiViewTransform(16), seed=seed, max_bad=max_bad)
    span = {"num_steps": num_steps, "start_step": start_step, "rank": rank, "world_size": world_size}
    return Loader(dataset, StepSampler(len(source), batch, seed=seed, **span), **options)


def stacked(batches) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(batches)
    return torch.cat([b.views for b in batches]), torch.cat([b.indices for b in batches])


# Which images, which crops


def test_steps_walk_through_each_epoch_once_in_a_new_order():
    sampler = StepSampler(13, 4, seed=1, num_steps=9)
    steps = list(sampler)
    assert sampler.steps_per_epoch == 3 and len(steps) == 9
    for epoch in range(3):
        keys = [key for step in steps[3 * epoch : 3 * epoch + 3] for key in step]
        assert {e for e, _ in keys} == {epoch} and len({i for _, i in keys}) == 12
    assert [i for _, i in steps[0]] != [i for _, i in steps[3]]
    assert steps != list(StepSampler(13, 4, seed=2, num_steps=9))


@pytest.mark.parametrize("start", [0, 1, 3, 5, 9])
def test_a_sampler_starts_at_any_step_as_if_it_had_run_so_far(start):
    whole = list(StepSampler(13, 4, seed=1, num_steps=9))
    sampler = StepSampler(13, 4, seed=1, num_steps=9)
    sampler.start_step = start
    assert list(sampler) == list(StepSampler(13, 4, seed=1, num_steps=9, start_step=start)) == whole[start:]


def test_a_sampler_starts_far_away_at_once_and_can_be_endless():
    assert len(next(iter(StepSampler(1000, 8, start_step=10**12)))) == 8  # no end is seen of walking through so many


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_a_step_in_contiguous_parts_and_make_equally_many(world_size):
    whole = list(StepSampler(13, 4, num_steps=7))
    parts = [list(StepSampler(13, 4, num_steps=7, rank=r, world_size=world_size)) for r in range(world_size)]
    assert [[key for part in step for key in part] for step in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 3, "batch_size": 4}, "batch size must be at most the 3 images, got 4"),
        ({"length": 9, "batch_size": 3, "world_size": 2}, "batch size must be a positive multiple of the 2 processes, got 3"),
        ({"length": 9, "batch_size": 0}, "batch size must be a positive multiple of .*, got 0"),
        ({"length": 9, "batch_size": 4, "rank": 2, "world_size": 2}, "rank must be 0 to 1 for 2 processes, got 2"),
    ],
)
def test_steps_that_cannot_be_are_refused_with_both_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        StepSampler(**arguments)


def test_batches_are_bit_equal_for_any_number_of_workers_start_and_processes():
    batches = list(loader(Arrays()))
    views, indices = stacked(batches)
    assert [batch.names for batch in batches] == [[f"image {i}" for i in batch.indices.tolist()] for batch in batches]
    for workers in (1, 3):
        again = stacked(loader(Arrays(), num_workers=workers))
        assert torch.equal(views, again[0]) and torch.equal(indices, again[1])
    late = stacked(loader(Arrays(), start_step=4, num_workers=2))
    assert torch.equal(views[16:], late[0])
    ranks = [list(loader(Arrays(), rank=r, world_size=2)) for r in range(2)]
    assert torch.equal(views, torch.cat([batch.views for step in zip(*ranks, strict=True) for batch in step]))


def test_four_workers_over_three_epochs_give_each_index_new_crops_and_leave_the_global_generator_alone():
    before, seen = torch.get_rng_state(), dict[int, set[bytes]]()
    for batch in loader(Arrays(12), num_steps=9, num_workers=4):
        for views, index in zip(batch.views, batch.indices.tolist(), strict=True):
            seen.setdefault(index, set()).update(view.numpy().tobytes() for view in views)
    assert set(seen) == set(range(12)) and all(len(crops) == 6 for crops in seen.values())
    assert torch.equal(before, torch.get_rng_state())
    first, again, other = (MultiViewDataset(Arrays(), MultiViewTransform(16), seed=seed)[(1, 5)].views for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_seeds_of_samples_do_not_collide():
    seeds = {sample_seed(seed, epoch, index) for seed in range(5) for epoch in range(20) for index in range(100)}
    assert len(seeds) == 10_000 and all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(1, 23, 4) != sample_seed(12, 3, 4)


# Bad images


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_named_once_and_another_stands_for_it_whatever_the_workers(tmp_path, workers):
    source, file = Arrays(bad=[2, 5]), tmp_path / "bad_files.txt"
    plain = stacked(loader(source))
    loading = loader(source, num_workers=workers, bad_file=file, num_steps=9)
    views, indices = stacked(loading)
    assert torch.equal(views[:24], plain[0]) and not {2, 5} & set(indices.tolist())
    lines = file.read_text().splitlines()
    assert sorted(lines) == ["image 2\tbroken 2", "image 5\tbroken 5"] and len(loading.bad) == 2
    again = loader(source, num_workers=workers, bad_file=file, num_steps=9)  # as a resumed run
    assert len(again.bad) == 2 and len(list(again)) == 9 and file.read_text().splitlines() == lines


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_images_stop_with_their_list_and_ten_in_a_row_at_once(tmp_path, workers):
    loading = loader(Arrays(40, bad=range(0, 40, 4)), max_bad=3, bad_file=tmp_path / "bad.txt", num_steps=20)
    with pytest.raises(DataError, match=r"bad images, more than the 3 allowed, all in .*bad\.txt\. Last: 'image"):
        list(loading)
    assert len((tmp_path / "bad.txt").read_text().splitlines()) >= 4
    with pytest.raises(DataError) as caught:
        list(loader(Arrays(1000, bad=range(1000)), num_workers=workers))
    assert str(caught.value).startswith("10 images in a row cannot be used; the last was 'image ")
    assert "\n" not in str(caught.value)


def test_a_folder_of_odd_images_loads_and_names_the_bad_ones(tmp_path):
    folder, good, odd_name = tmp_path / "odd", Image.fromarray(Arrays().image(0)), "a\nb\t$(x) ü\udcff.jpg"
    (folder / "x.jpg").mkdir(parents=True)
    good.save(folder / "x.jpg" / "inside.png")
    good.save(folder / "good.JPG")
    good.convert("CMYK").save(folder / "cmyk.jpg")
    good.quantize(16).save(folder / "palette.png", transparency=bytes(16))
    good.save(folder / "animated.gif", save_all=True, append_images=[good] * 2)
    Image.fromarray(np.full((20, 24), 40_000, np.uint16)).save(folder / "deep.png")
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    encoded = (folder / "good.JPG").read_bytes()
    bad = {"empty.jpg": b"", odd_name: b"<html>", "cut.jpg": encoded[:-99], "zeros.jpg": encoded[:-200] + bytes(200)}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    (folder / "loop").symlink_to(folder)
    source = open_images(folder)
    assert len(source) == 7 + len(bad)
    loading = loader(source, batch=11, num_steps=2, num_workers=1, bad_file=tmp_path / "bad.txt")
    assert len(list(loading)) == 2 and {Path(name).name for name in loading.bad} == {repr(name)[1:-1] for name in bad}
    assert len((tmp_path / "bad.txt").read_text().splitlines()) == len(bad)
    assert loader(source, bad_file=tmp_path / "bad.txt").bad == loading.bad


def test_a_bad_file_that_cannot_be_written_does_not_stop_the_run(tmp_path):
    loading = loader(Arrays(bad=[2]), bad_file=tmp_path / "absent" / "bad.txt")
    assert len(list(loading)) == 6 and len(loading.bad) == 1


@pytest.mark.posix
@pytest.mark.parametrize("fault", ["remove", "empty", "unreadable"])
def test_files_that_change_after_the_scan_are_bad_images(tmp_path, fault):
    for i in range(6):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{i}.jpg")
    source = open_images(tmp_path)
    victim = tmp_path / "3.jpg"
    if fault == "unreadable" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    {"remove": victim.unlink, "empty": lambda: victim.write_bytes(b""), "unreadable": lambda: victim.chmod(0)}[fault]()
    loading = loader(source, batch=6, num_steps=2)
    assert len(list(loading)) == 2 and [*loading.bad] == [str(victim)]


def test_errors_of_a_users_data_set_are_bad_images_and_bugs_are_not():
    def hook(index):
        if index == 3:
            raise OSError("disk\ngone")

    loading = loader(Arrays(hook=hook))
    list(loading)
    assert loading.bad == {"image 3": "OSError: disk gone"}

    def bug(index):
        raise AttributeError("typo")

    with pytest.raises(AttributeError, match="typo"):
        list(loader(Arrays(hook=bug)))


# Workers


def limit_files():
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def fill_shared_memory():
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)")

    torch.Tensor.share_memory_ = full


def die_with_the_lock_that_workers_share():
    """As a worker that is killed within ``Event.is_set``."""
    for event in gc.get_objects():
        if type(event) is multiprocessing.synchronize.Event:
            event._cond.acquire(False)
    os.kill(os.getpid(), signal.SIGKILL)


def at_seven(fault, index):
    if index == 7:
        fault()


@pytest.mark.linux
@pytest.mark.parametrize("plain", [False, True], ids=["views", "other samples"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (limit_files, "limit is used up: fewer workers, a smaller batch, `ulimit`.*File too large"),
        (fill_shared_memory, "shared memory or a limit is used up: fewer workers.*--shm-size.*No space left on device"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"a loading worker died \(out of memory\?\)"),
        (die_with_the_lock_that_workers_share, r"a loading worker died \(out of memory\?\)"),
    ],
    ids=["ulimit", "shared memory", "killed", "killed with a lock"],
)
def test_a_dead_worker_and_memory_that_is_full_are_one_line_with_the_cure(fault, message, plain):
    batches = loader(Arrays(hook=partial(at_seven, fault)), num_workers=2, collate=list if plain else None)
    with pytest.raises(DataError, match=message) as caught:
        list(batches)
    assert "\n" not in str(caught.value)


def test_a_disk_that_hangs_is_a_line_and_then_the_end(monkeypatch, caplog):
    for name, seconds in (("TURN", 1), ("NOTICE", 1), ("TIMEOUT", 2)):
        monkeypatch.setattr(f"mvmae.data.loader.{name}", seconds)
    batches = loader(Arrays(hook=partial(at_seven, partial(time.sleep, 60))), num_workers=1)
    with pytest.raises(DataError, match="^no batch came in 2 s: a file or its disk hangs$"):
        list(batches)
    assert caplog.messages == ["no batch for 1 s: a file or its disk is slow"]


@pytest.mark.posix
def test_a_workers_death_is_raised_where_a_batch_is_waited_for_and_never_within_a_step():
    others = set(multiprocessing.active_children())
    batches = iter(loader(Arrays(), num_workers=1, num_steps=60))
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    worker.kill()
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # stands for a step; torch's own handler would raise here
    with pytest.raises(DataError, match="a loading worker died"):
        list(batches)


class Pairs:
    """Samples that are no views, the seventh of which raises an error."""

    def __init__(self, error):
        self.error = error

    def __getitem__(self, key):
        if key[1] == 7:
            raise self.error
        return torch.tensor(key), {"name": f"{key[1]}.png"}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("7.png is gone"), r"OSError: 7\.png is gone$"),
        (ImageError("7.png", "no\nimage"), r"^cannot read image '7\.png': no image$"),
        (MemoryError(), "^memory, .* is used up: fewer workers, a smaller batch"),
    ],
    ids=["disk", "image", "memory"],
)
def test_samples_of_any_data_set_are_loaded_and_an_error_is_one_line(workers, error, message):
    sampler = StepSampler(13, 4, num_steps=6)
    expected, seen = list(sampler), []
    failing = next(step for step, keys in enumerate(expected) if 7 in [index for _, index in keys])
    with pytest.raises(DataError, match=message):
        for batch in Loader(Pairs(error), sampler, num_workers=workers, collate=list):
            seen.append([tuple(numbers.tolist()) for numbers, _ in batch])
    assert seen == expected[:failing]


@pytest.mark.linux
def test_workers_ignore_signals_and_end_with_the_main_process_even_where_one_hangs():
    script = """
        import multiprocessing, os, signal, time
        import numpy as np
        from mvmae.data import ImageSource, Loader, MultiViewDataset, MultiViewTransform

        class Noise(ImageSource):
            def image(self, index):
                if index == 49:
                    time.sleep(600)
                return np.full((20, 20, 3), index, np.uint8)

        dataset = MultiViewDataset(Noise([b"x"] * 50), MultiViewTransform(16))
        keys = [[(0, i)] for i in range(8)] + [[(0, 49)]] * 2
        batches = iter(Loader(dataset, keys, num_workers=2))
        next(batches), next(batches)  # one of each worker: both have started
        for child in multiprocessing.active_children():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
                os.kill(child.pid, number)
            print(child.pid)
        for _ in range(6):
            next(batches)
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.alarm(1)
        try:
            next(batches)
        except KeyboardInterrupt:
            print("stopped", flush=True)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    *pids, last = ended.stdout.split()
    assert ended.returncode == 0 and last == "stopped" and len(pids) == 2, ended.stderr
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def private_memory(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))  # kB


@pytest.mark.linux
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_the_memory_of_a_worker_does_not_grow_with_the_names_it_reads():
    names = [f"some/folder/of/many/{i:08d}.jpg".encode() for i in range(200_000)]
    source = FileSource(Path("/"), names)
    expected = sum(map(len, names))
    del names

    def grown(read) -> int:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            before = private_memory(os.getpid())
            for index in range(0, 200_000, 2):
                read(index)
            os.write(writing, str(private_memory(os.getpid()) - before).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        result = int(os.read(reading, 20))
        os.close(reading)
        os.close(writing)
        return result * 1024

    listed = [source.name(i) for i in range(200_000)]
    as_list, as_block = grown(lambda i: listed[i]), grown(source.name)
    assert as_list > expected > 4 * as_block  # the check can fail: a list does grow
