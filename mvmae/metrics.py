"""Measures of features: k-NN accuracy with labels; view retrieval, rank, uniformity, collapse without.

Two more compare the features of the same images before and after further training.

Shapes: N features in the bank or the set, Q queries, D width of a feature, k neighbours. All functions work in chunks, so that
memory grows with N * D and never with N * Q or N * N.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)
"""Types of devices that have no float64: the GPU of a Mac."""
COLLAPSED_RANK = 2.0
"""Features that differ by one per cent of their length have about this effective rank; those of an untrained ViT have 20."""


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk_size: int = 1024,
) -> float:
    """Compute the share of queries, in 0 to 1, for whose label their k nearest features vote, by cosine similarity.

    A neighbour's vote weighs exp(similarity / temperature) (Wu et al., 2018, as used by DINO). The smallest label wins a tie.

    Args:
        train_features: the bank, (N, D), of any length and on any device; it is copied to the queries' device in parts.
        train_labels: (N,) integers.
        test_features: the queries, (Q, D).
        test_labels: (Q,) integers.
        k: neighbours that vote, 1 to N (DINO: 20).
        temperature: temperature of a vote's weight, above 0.
        chunk_size: queries at a time, compared with sixteen times as many features of the bank.

    Raises:
        ValueError: if shapes do not agree, k or temperature is out of range, or a feature is not finite.
    """
    for name, features, labels in (("train", train_features, train_labels), ("test", test_features, test_labels)):
        _check(f"{name}_features", features, labels)
    if not 1 <= k <= len(train_features) or not temperature > 0:
        raise ValueError(
            f"k must be 1 to {len(train_features)}, the number of labelled features, and temperature above 0, got {k}, "
            f"{temperature}"
        )
    classes, labels = train_labels.to(test_features.device).unique(return_inverse=True)
    right = 0
    for queries, wanted in zip(test_features.split(chunk_size), test_labels.to(classes).split(chunk_size), strict=True):
        similarity, neighbours = _nearest(_unit(queries), train_features, k, 16 * chunk_size)  # (Q, k) each
        # the nearest one's weight is 1: ratios of votes stay, and no temperature is too low for exp
        votes = ((similarity - similarity[:, :1]) / temperature).exp()
        total = votes.new_zeros(len(queries), len(classes)).scatter_add_(1, labels[neighbours], votes)
        right += int((classes[total.argmax(dim=1)] == wanted).sum())
    return right / len(test_features)


def _nearest(queries: Tensor, bank: Tensor, k: int, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Return the k largest similarities and their places in the bank, (Q, k) each, the largest first; refuse NaN."""
    best = queries.new_empty(len(queries), 0)
    places = torch.empty_like(best, dtype=torch.long)
    for start in range(0, len(bank), chunk_size):
        part = _unit(bank[start : start + chunk_size].to(queries.device)).to(queries.dtype)
        similarity, place = (queries @ part.T).topk(min(k, len(part)), dim=1)
        best, places = torch.cat([best, similarity], dim=1), torch.cat([places, place + start], dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        places = places.gather(1, order)
    if best.isnan().any():
        raise ValueError("a feature is NaN or infinite: the encoder has diverged, or its images are not normalised")
    return best, places


def view_retrieval(features: Tensor, *, chunk_size: int = 1024) -> float:
    """Compute the share of views whose nearest other view, by cosine similarity, is one of the same image, in 0 to 1.

    ``features`` are of Q >= 2 random views of each of N >= 2 images, (N, Q, D). Needs no labels (Wu et al., 2018).

    Raises:
        ValueError: if there are too few images or views, or a feature is not finite.
    """
    if features.ndim != 3 or min(features.shape[:2]) < 2:
        raise ValueError(f"features must have the shape (N, Q, D) with N and Q >= 2, got {tuple(features.shape)}")
    views, right = features.flatten(0, 1), 0
    for own in torch.arange(len(views), device=features.device).split(chunk_size):
        _, places = _nearest(_unit(views[own]), views, 2, 16 * chunk_size)  # one of the two may be the view itself
        nearest = torch.where(places[:, 0] == own, places[:, 1], places[:, 0])
        right += int((nearest // features.shape[1] == own // features.shape[1]).sum())
    return right / len(views)


def effective_rank(features: Tensor, *, chunk_size: int = 65536) -> float:
    """Compute the number of directions that features, (N, D), use: RankMe (Garrido et al., 2023).

    exp(-sum_i p_i log p_i) with p_i = sigma_i / sum_j sigma_j, the singular values of the (N, D) matrix of features, neither
    normalised nor centred: 1 where all are the same vector, min(N, D) where all directions are used alike.

    Raises:
        ValueError: if there is no feature, or one is not finite.
    """
    _check("features", features)
    gram = as_double(features.new_zeros(features.shape[1], features.shape[1]))
    for part in map(as_double, features.split(chunk_size)):
        gram.addmm_(part.T, part)
    if not gram.isfinite().all():
        raise ValueError("a feature is NaN or infinite: the encoder has diverged, or its images are not normalised")
    sigma = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    p: Tensor = sigma / sigma.sum().clamp(min=torch.finfo(sigma.dtype).tiny)
    return float(torch.special.entr(p).sum().exp())


def uniformity(features: Tensor, *, t: float = 2.0, chunk_size: int = 1024) -> float:
    """Compute how evenly features, (N, D), cover the sphere: log mean of exp(-t |x - y|^2) over all pairs (Wang & Isola, 2020).

    0 where all features are the same vector, about -2t where they cover the sphere: lower is better. The time grows with N * N.

    Raises:
        ValueError: if there are fewer than two features.
    """
    _check("features", features, at_least=2)
    features, parts = _unit(features), []
    for start in range(0, len(features), chunk_size):
        part, others = features[start : start + chunk_size], features[start:]
        distance = (2 - 2 * part @ others.T).clamp(min=0)  # of unit vectors, squared
        pair = torch.ones_like(distance, dtype=torch.bool).triu(diagonal=1)  # each pair once
        parts.append(as_double((-t * distance).masked_fill(~pair, -torch.inf).flatten()).logsumexp(dim=0))
    pairs = len(features) * (len(features) - 1) / 2
    return float(torch.stack(parts).logsumexp(dim=0)) - math.log(pairs)


def collapse_warning(features: Tensor | float) -> str | None:
    """Return a warning, one line, if the features of different images, (N, D), or their `effective_rank`, have collapsed."""
    rank = effective_rank(features) if isinstance(features, Tensor) else features
    if rank >= COLLAPSED_RANK:
        return None
    return (
        f"the representation has collapsed: the effective rank of the features is {rank:.3f}, all images are (nearly) one "
        "vector; lower the learning rate or loss_weight, or look for images that are all the same"
    )


def mean_cosine(before: Tensor, after: Tensor) -> float:
    """Compute the mean cosine between features, (N, D) each, before and after: 1 where no direction has changed."""
    return float(F.cosine_similarity(as_double(before), as_double(after), dim=1).mean())


def linear_cka(before: Tensor, after: Tensor) -> float:
    """Compute how alike two sets of features, (N, D) and (N, E), tell the same images apart (Kornblith et al., 2019).

    Unlike `mean_cosine` it ignores rotations and a common scale. 1 for equal sets, 0 where one has the same feature for all.
    """
    x, y = (features - features.mean(dim=0) for features in map(as_double, (before, after)))
    norms = (x.T @ x).norm() * (y.T @ y).norm()
    return float((y.T @ x).square().sum() / norms) if norms > 0 else 0.0


def as_double(values: Tensor) -> Tensor:
    """Return values as float64, on their own device if it can hold them, else (`WITHOUT_FLOAT64`) on the CPU."""
    return (values.cpu() if values.device.type in WITHOUT_FLOAT64 else values).double()


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=1)


def _check(name: str, features: Tensor, labels: Tensor | None = None, *, at_least: int = 1) -> None:
    if features.ndim != 2 or len(features) < at_least or (labels is not None and labels.shape != features.shape[:1]):
        of_labels = "" if labels is None else f" with labels (N,), got {tuple(labels.shape)}"
        raise ValueError(f"{name} must be (N, D) with N >= {at_least}, got {tuple(features.shape)}{of_labels}")
