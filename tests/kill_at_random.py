"""Kills short pretraining runs at random moments, resumes them, and compares the end bit for bit with an undisturbed run.

Not one of the tests that pytest finds: `python tests/kill_at_random.py --kills 200` takes about ten minutes.
"""

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

from tiny_run import assert_identical, end_of, losses, start, write_images

STEPS = ["--max-steps", 60, "--epochs", 20, "--save-every", 2, "--eval-every", 0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        images, folder, whole = (Path(place) / name for name in ("images", "cut", "whole"))
        images.mkdir()
        write_images(images)
        undisturbed = start(whole, images, *STEPS, "--workers", 0).finish()
        assert undisturbed.code == 0, undisturbed.err
        start(folder, images, *STEPS, "--workers", 0).finish()  # once more, now that all is in memory, for the time it takes
        begin = time.monotonic()
        shutil.rmtree(folder)
        start(folder, images, *STEPS, "--workers", 0).finish()
        duration = time.monotonic() - begin
        shutil.rmtree(folder)
        kills = starts = ends = at_start = 0
        while kills < options.kills:
            process, starts = start(folder, images, *STEPS, "--resume", "--workers", rng.choice([0, 1, 2])), starts + 1
            process.process.join(rng.uniform(0, duration))
            if process.process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            result = process.finish()
            if result.code == -signal.SIGKILL:
                at_start += not (folder / "run" / "checkpoint.pt").exists()
                continue
            assert result.code == 0, result
            assert_identical(end_of(folder), end_of(whole))
            assert losses(folder) == losses(whole)
            ends += 1
            shutil.rmtree(folder)
            print(f"{kills} kills, {starts} starts, {ends} ends, each bit-identical", flush=True)
        final = start(folder, images, *STEPS, "--resume", "--workers", 0).finish()
        assert final.code == 0, final
        assert_identical(end_of(folder), end_of(whole))
        assert losses(folder) == losses(whole)
        print(f"{kills} kills, {at_start} of them before a first checkpoint; {ends + 1} ends, each bit-identical")


if __name__ == "__main__":
    main()
