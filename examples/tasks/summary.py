"""A page on a finished pretraining run, for its folder: what it was, how long it took, how good it is, and what to do next."""

import datetime
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.pace import duration
from tasks.monitor import report
from tasks.verdict import Verdict

NAMES = {"loss": "loss", "loss_rec": "reconstruction loss", "loss_con": "contrastive loss"}


def summary_page(
    folder: Path,
    about: Mapping[str, str],
    records: Sequence[Mapping[str, Any]],
    before: Mapping[str, float],
    after: Mapping[str, float],
    verdict: Verdict | None,
    *,
    data: str,
    command: Sequence[str],
) -> str:
    """Return the page, in Markdown; what was not measured is left out.

    Args:
        folder: of the run.
        about: what was trained, part by part, as the run's first lines say it.
        records: lines of ``log.jsonl``.
        before: the first look.
        after: the last look.
        verdict: at the end.
        data: what ``--data`` was.
        command: words of the command line.
    """
    parts = [f"# {folder.name}", "## What", *(f"- {name}: {text}" for name, text in about.items() if text)]
    lines = [record for record in records if "loss" in record]
    parts += ["## How long", *how_long(records)]
    parts += ["## How good", *(f"- {line}" for line in report(before, after))]
    for name, told in NAMES.items():
        if (values := [record[name] for record in lines if name in record]) and len(values) > 1:
            parts.append(f"- {told}: {values[0]:.4g} at first, {values[-1]:.4g} at the end")
    if verdict:
        parts.append(f"- verdict: {verdict.name}: {verdict.why}")
    parts += ["## What to do next", *(f"- {line}" for line in what_next(folder, data, verdict))]
    parts += ["## Command", f"    {shlex.join(command)}"]
    text = "\n".join(f"\n{part}\n" if part.startswith("#") else part for part in parts)
    return text.strip("\n").replace("\n\n\n", "\n\n") + "\n"


def how_long(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines on time, speed, waiting and memory, from what the log holds of them."""
    times = [record["time"] for record in records if "time" in record]
    told = []
    if len(times) > 1:
        end = datetime.datetime.fromtimestamp(times[-1], datetime.timezone.utc)
        told.append(f"- {duration(times[-1] - times[0])} from the first to the last line of the log, interruptions included")
        told.append(f"- ended on {end:%Y-%m-%d %H:%M} UTC")
    for name, form in (("images_per_second", "{:.1f} images/s"), ("waiting", "{:.0%} of the time waiting for data")):
        if values := sorted(record[name] for record in records if name in record):
            told.append(f"- {form.format(values[len(values) // 2])} (median of the log's lines)")
    if peaks := [record["memory_gb"] for record in records if "memory_gb" in record]:
        told.append(f"- {max(peaks):.2f} GB of memory at most")
    return told


def what_next(folder: Path, data: str, verdict: Verdict | None) -> list[str]:
    """Return what a user may do after the run: the verdict's cure first, then how to measure and use the encoder."""
    told = [f"{verdict.name}: {verdict.cure}"] if verdict and verdict.name != "learning" else []
    run = shlex.quote(str(folder))
    told.append("look at curves.png and reconstructions.png")
    measure = f"python examples/linear_probe.py --data {shlex.quote(data)} --models {run} random:{run}"
    told.append(f"measure the encoder, where images have labels: `{measure}`")
    told.append(f'use it: `timm.create_model("local-dir:{folder / "encoder"}", pretrained=True)`')
    return told
