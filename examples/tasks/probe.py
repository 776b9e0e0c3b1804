"""What frozen features are worth: effective rank, k-NN, few labels, and linear layers that are trained on them.

Shapes: N labelled images of a bank, Q queries, B images of a batch, D width of a feature, H heads.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn

from mvmae.metrics import as_double, effective_rank, knn_accuracy

NEIGHBOURS = 20  # DINO
DRAWS = 5  # of the few labelled images
DECAY = 1e-3  # of the weights of the classifier on few labels, ours
PROBE_DECAY = 1e-4  # likewise on all of them
EPS = 1e-6  # added to a feature's variance (MAE)


def measure(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], *, few_shot: Sequence[int] = ()) -> dict[str, float]:
    """Compute the effective ``rank``, and in percent ``knn``, and for each number of labels ``shotK`` and ``shotK_std``.

    Args:
        train: features (N, D) and labels (N,) of the bank.
        val: features (Q, D) and labels (Q,) of held-out images.
        few_shot: numbers K of labels for each class; 0: none.
    """
    results = {"rank": effective_rank(val[0]), "knn": 100 * knn_accuracy(*train, *val, k=min(NEIGHBOURS, len(train[0])))}
    for shots in filter(None, few_shot):
        scores = torch.tensor([few_label_accuracy(*train, *val, shots, seed) for seed in range(DRAWS)])
        results |= {f"shot{shots}": scores.mean().item(), f"shot{shots}_std": scores.std().item()}
    return results


def few_label_accuracy(bank: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, shots: int, seed: int) -> float:
    """Compute the accuracy in percent of logistic regression on ``shots`` images of each class, of features of unit length."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    rows = torch.cat([order[labels[order] == label][:shots] for label in labels.unique()])
    return _accuracy(F.normalize(bank[rows]), labels[rows], F.normalize(queries), query_labels, DECAY)


def linear_accuracy(bank: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor) -> float:
    """Compute the accuracy in percent of logistic regression on features that are standardised, as MAE's linear probe does.

    Each feature has mean 0 and variance 1 / D over the bank. Without that, a vector that all features share is most of their
    length, and weight decay keeps the classifier from what distinguishes them.
    """
    mean, scale = bank.mean(dim=0), (bank.shape[1] * (bank.var(dim=0, correction=0) + EPS)).sqrt()
    return _accuracy((bank - mean) / scale, labels, (queries - mean) / scale, query_labels, PROBE_DECAY)


def _accuracy(bank: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, decay: float) -> float:
    weight, bias = logistic_regression(bank, labels, int(labels.max()) + 1, decay=decay)
    return 100 * as_double(F.linear(queries, weight, bias).argmax(dim=1) == query_labels).mean().item()


def logistic_regression(x: Tensor, labels: Tensor, num_classes: int, *, decay: float) -> tuple[Tensor, Tensor]:
    """Minimise the mean cross-entropy + decay / 2 * |weight|^2; return weight (classes, D) and bias (classes,)."""
    weight = x.new_zeros(num_classes, x.shape[1]).requires_grad_()
    bias = x.new_zeros(num_classes).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


class Probe(nn.Module):
    """Linear layers (heads) on one feature: the recipe's first, then one for each other multiple of its learning rate.

    Args:
        width: D.
        num_classes: of each layer.
        multiples: of the learning rate; the recipe's own, 1, comes first.
        batch_norm: normalise the feature over the batch first, without affine part (MAE).
    """

    def __init__(self, width: int, num_classes: int, *, multiples: Sequence[float], batch_norm: bool) -> None:
        super().__init__()
        self.multiples = tuple(dict.fromkeys((1.0, *multiples)))
        self.norm = nn.BatchNorm1d(width, affine=False, eps=EPS) if batch_norm else nn.Identity()
        self.heads = nn.ModuleList(nn.Linear(width, num_classes) for _ in self.multiples)
        for name, parameter in self.heads.named_parameters():
            nn.init.normal_(parameter, std=0.01 if name.endswith("weight") else 0.0)  # MoCo v3 and MAE

    def forward(self, features: Tensor) -> Tensor:
        """Compute the logits of every head: (B, D) -> (H, B, classes)."""
        normed = self.norm(features)
        return torch.stack([head(normed) for head in self.heads])


def probe_optimizer(probe: Probe, name: str) -> torch.optim.Optimizer:
    """Build SGD or LARS with momentum 0.9 and no weight decay; ``lr_scale`` of a head is its multiple.

    LARS does not adapt the rate of biases (MAE).
    """
    groups: list[dict[str, Any]] = []
    for head, multiple in zip(probe.heads, probe.multiples, strict=True):
        adapted = {"always_adapt": True} if name == "lars" else {}
        groups.append({"params": [head.weight], "lr_scale": multiple, **adapted})
        groups.append({"params": [head.bias], "lr_scale": multiple})
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    optimizer: torch.optim.Optimizer = Lars(groups, lr=1.0, momentum=0.9, weight_decay=0.0, trust_coeff=1e-3)
    return optimizer


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Format the results of several models as a Markdown table; a cell without a number is empty."""
    shots = dict.fromkeys(key for result in results for key in result if re.fullmatch(r"shot\d+", key))
    columns = {"model": "model", "knn": "k-NN", "linear": "linear", "best": "best on val"}
    columns |= {key: f"{key[4:]} label{'s' * (key != 'shot1')} per class" for key in shots} | {"rank": "effective rank"}
    lines = [" | ".join(columns.values()), " | ".join("---" for _ in columns)]
    lines += [" | ".join(cell(result, key) for key in columns) for result in results]
    return "\n".join(f"| {line} |" for line in lines)


def cell(result: Mapping[str, Any], key: str, digits: int = 1) -> str:
    """Return a number of a result, with its deviation where it has one, as a cell of a table; empty where there is none."""
    value, spread = result.get(key, ""), result.get(f"{key}_std")
    return value if isinstance(value, str) else f"{value:.{digits}f}" + ("" if spread is None else f" ± {spread:.1f}")
