"""What adapting an encoder has gained and lost: a table of measures before and after, on held-out images of several sets.

Shapes: N images of a bank, Q queries, D width of a feature.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mvmae import MultiViewMAE
from mvmae.metrics import linear_cka, mean_cosine
from tasks.choice import Choice
from tasks.monitor import NEIGHBOURS, Monitor
from tasks.probe import logistic_accuracy, measure

SHOTS = (1, 5)
"""Labels for each class of the rows with few labels, each the mean of `probe.DRAWS` draws."""
COLUMNS = {
    "knn_avg": "k-NN",
    "linear": "linear probe",
    "shot1_avg": "1 label a class",
    "shot5_avg": "5 labels a class",
    "rank_avg": "effective rank",
    "similarity": "cosine to the start",
    "cka": "CKA with the start",
}


def measured(bank: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor) -> dict[str, float]:
    """Compute what features are worth: with labels, accuracies in percent; without, their effective rank alone.

    The linear probe is logistic regression on features of unit length, solved by L-BFGS, as that on few labels.

    Args:
        bank: features of labelled images, (N, D); none of N where there are none.
        labels: of the bank, (N,); -1 where there is none.
        queries: features of held-out images, (Q, D).
        query_labels: (Q,), likewise.
    """
    known = len(bank) and min(labels.min(), query_labels.min()) >= 0
    shots, neighbours = (SHOTS, NEIGHBOURS) if known else ((), 0)
    found = measure(({"avg": bank}, labels), ({"avg": queries}, query_labels), neighbours=neighbours, few_shot=shots)
    if known:
        found["linear"] = logistic_accuracy(bank, labels, queries, query_labels, int(labels.max()) + 1)
    return found


@torch.no_grad()
def compare(choice: Choice, model: MultiViewMAE, sets: Mapping[str, Monitor]) -> list[str]:
    """Return the lines of a Markdown table: each set of images, before and after, by the measures that its labels allow.

    All processes must call it. The encoder has its weights back at the end.

    Args:
        choice: which knows the encoder of the start, and the one that the run leaves.
        model: whose encoder is measured.
        sets: by name, what looks at each set of images.
    """
    rows: list[dict[str, Any]] = []
    training = model.training
    model.eval()
    for name, monitor in sets.items():
        before: Tensor | None = None
        for moment, weights in (("before", choice.start), ("after", dict(choice.chosen()))):
            with choice.applied(weights):
                queries, query_labels = monitor.extract(model.features, monitor.looked_at, monitor.limit)
                bank, labels = queries[:0], query_labels[:0]
                if monitor.val is not None:
                    bank, labels = monitor.extract(model.features, monitor.train, monitor.limit)
            row = {"set": name, "moment": moment} | measured(bank, labels, queries, query_labels)
            if before is not None:
                row |= {"similarity": mean_cosine(before, queries), "cka": linear_cka(before, queries)}
            before = queries
            rows.append(row)
    model.train(training)
    shown = {key: title for key, title in COLUMNS.items() if any(key in row for row in rows)}
    lines = [" | ".join(["images", "encoder", *shown.values()]), " | ".join(["---"] * (2 + len(shown)))]
    lines += [" | ".join([row["set"], row["moment"], *(_cell(row, key) for key in shown)]) for row in rows]
    return [f"| {line} |" for line in lines]


def _cell(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        return ""
    spread = f" ± {row[f'{key}_std']:.1f}" if f"{key}_std" in row else ""
    return f"{row[key]:.3f}" if key in ("similarity", "cka") else f"{row[key]:.1f}{spread}"
