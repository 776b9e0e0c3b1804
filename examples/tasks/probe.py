"""A frozen model: its features of labelled images, their measures, and linear layers that are trained on them.

Shapes: N images, B of a batch, D width of a feature.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn

from mvmae.metrics import as_double, effective_rank, knn_accuracy

Features = dict[str, Tensor]
DRAWS = 5  # of the few labelled images
DECAY = 1e-3  # of the weights of the classifier on few labels, ours
PROBE_DECAY = 1e-4  # likewise on all of them
EPS = 1e-6  # added to a feature's variance (MAE)


def freeze(model: nn.Module) -> nn.Module:
    """Keep a model from changing: no gradient, no dropout, no statistics that move."""
    return model.eval().requires_grad_(False)


def pooled(model: Any, images: Tensor) -> Features:
    """Compute features (B, D) in float32: mean patch token and class token of a transformer, else the pooled map."""
    tokens, prefix = model.forward_features(images), getattr(model, "num_prefix_tokens", None)
    if tokens.ndim != 3 or prefix is None:
        return {"avg": model.forward_head(tokens, pre_logits=True).float()}
    norm = getattr(model, "fc_norm", None) or nn.Identity()
    features = {"avg": norm(tokens[:, prefix:].mean(dim=1)).float()}
    return features | ({"token": norm(tokens[:, 0]).float()} if getattr(model, "cls_token", None) is not None else {})


def measure(
    train: tuple[Features, Tensor], val: tuple[Features, Tensor], *, neighbours: int, few_shot: Sequence[int]
) -> dict[str, float]:
    """Compute, for each kind of feature, effective rank, k-NN accuracy, and accuracy with few labels: mean and deviation."""
    results: dict[str, float] = {}
    for kind in val[0]:
        bank, queries = train[0][kind], val[0][kind]
        results[f"rank_{kind}"] = effective_rank(queries)
        if neighbours:
            k = min(neighbours, len(bank))
            results[f"knn_{kind}"] = 100 * knn_accuracy(bank, train[1], queries, val[1], k=k)
        for shots in filter(None, few_shot):
            scores = torch.tensor([few_label_accuracy(bank, train[1], queries, val[1], shots, seed) for seed in range(DRAWS)])
            results |= {f"shot{shots}_{kind}": scores.mean().item(), f"shot{shots}_{kind}_std": scores.std().item()}
    return results


def few_label_accuracy(bank: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, shots: int, seed: int) -> float:
    """Compute the accuracy in percent of logistic regression on ``shots`` images of each class, of features of unit length."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    members = [order[labels[order] == label][:shots] for label in labels.unique()]
    rows = torch.cat(members)
    return _accuracy(F.normalize(bank[rows]), labels[rows], F.normalize(queries), query_labels, DECAY)


def linear_accuracy(bank: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor) -> float:
    """Compute the accuracy in percent of logistic regression on features that are standardised, as `Probe` does (MAE).

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
    """A linear layer for each kind of feature and each multiple of the learning rate, ``avg_0`` that of the recipe.

    Args:
        widths: D of each kind of feature.
        num_classes: of each layer.
        multiples: of the learning rate, the recipe's own, 1, first.
        batch_norm: normalise each feature over the batch first, without affine part (MAE).
        std: of the layers' first weights.
    """

    def __init__(
        self, widths: Mapping[str, int], num_classes: int, *, multiples: Sequence[float], batch_norm: bool, std: float
    ) -> None:
        super().__init__()
        self.multiples = tuple(multiples)
        norms = {kind: nn.BatchNorm1d(width, affine=False, eps=EPS) for kind, width in widths.items() if batch_norm}
        self.norms, self.heads = nn.ModuleDict(norms), nn.ModuleDict()
        for kind, width in widths.items():
            for number in range(len(multiples)):
                head = self.heads[f"{kind}_{number}"] = nn.Linear(width, num_classes)
                nn.init.normal_(head.weight, std=std)
                nn.init.zeros_(head.bias)

    def forward(self, features: Features) -> Features:
        """Compute the logits (B, classes) of every layer."""
        normed = {kind: self.norms[kind](x) if kind in self.norms else x for kind, x in features.items()}
        return {name: head(normed[name.rpartition("_")[0]]) for name, head in self.heads.items()}


def head_optimizer(probe: Probe, name: str, *, lr: float) -> torch.optim.Optimizer:
    """Build SGD or LARS with momentum 0.9 and no weight decay; LARS does not adapt the rate of biases (MAE)."""
    groups: list[dict[str, Any]] = []
    for head_name, head in probe.heads.items():
        rate = lr * probe.multiples[int(head_name.rpartition("_")[2])]
        groups += [{"params": [head.weight], "lr": rate, "always_adapt": True}, {"params": [head.bias], "lr": rate}]
    if name == "sgd":
        return torch.optim.SGD([{"params": g["params"], "lr": g["lr"]} for g in groups], momentum=0.9, weight_decay=0.0)
    optimizer: torch.optim.Optimizer = Lars(groups, lr=lr, momentum=0.9, weight_decay=0.0, trust_coeff=1e-3)
    return optimizer


def table(results: list[dict[str, Any]]) -> str:
    """Format results as a Markdown table; a cell without a number is empty, and the paper's column left out if all are."""
    shots = dict.fromkeys(key for result in results for key in result if re.fullmatch(r"shot\d+_avg", key))
    columns = {"model": "model", "knn_avg": "k-NN", "linear": "linear", "best": "best on val"}
    columns |= {"paper": "linear, the paper's"} if any(result.get("paper") for result in results) else {}
    columns |= {key: f"{key[4:-4]} label{'s' * (key[4:-4] != '1')} per class" for key in shots} | {"rank_avg": "effective rank"}
    lines = [" | ".join(columns.values()), " | ".join("---" for _ in columns)]
    lines += [" | ".join(_cell(result, key) for key in columns) for result in results]
    return "\n".join(f"| {line} |" for line in lines)


def _cell(result: Mapping[str, Any], key: str) -> str:
    value, spread = result.get(key), result.get(f"{key}_std")
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.1f}" + ("" if spread is None else f" ± {spread:.1f}")
