import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from mvmae.metrics import (
    collapse_warning,
    effective_rank,
    knn_accuracy,
    uniformity,
    view_retrieval,
)


@pytest.fixture
def labelled():
    """2000 vectors of 10 overlapping classes in 32 dimensions, and 300 queries, in float64 so that no two distances tie."""
    centres = torch.randn(10, 32, dtype=torch.float64)
    train_labels, test_labels = torch.randint(10, (2000,)), torch.randint(10, (300,))
    train, test = (centres[labels] + 2 * torch.randn(len(labels), 32) for labels in (train_labels, test_labels))
    return train, train_labels, test, test_labels


@pytest.mark.parametrize("k", [1, 5, 20, 200])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_knn_equals_that_of_scikit_learn(labelled, k, temperature):
    train, train_labels, test, test_labels = labelled
    options = {"metric": "cosine", "algorithm": "brute", "weights": lambda distance: np.exp((1 - distance) / temperature)}
    peer = KNeighborsClassifier(k, **options).fit(train.numpy(), train_labels.numpy())
    predicted = torch.from_numpy(peer.predict(test.numpy()))
    assert knn_accuracy(train, train_labels, test, predicted, k=k, temperature=temperature, chunk_size=37) == 1
    accuracy = knn_accuracy(train, train_labels, test, test_labels, k=k, temperature=temperature)
    assert accuracy == pytest.approx(peer.score(test.numpy(), test_labels.numpy()))
    assert 0.3 < accuracy < 0.99


@pytest.mark.parametrize("chunk_size", [1, 3, 64, 5000])
def test_chunks_change_nothing(labelled, chunk_size):
    train, labels, test = (values[:200] for values in labelled[:3])
    accuracies = {knn_accuracy(train, labels, test, labels, chunk_size=size) for size in (chunk_size, 100_000)}
    assert len(accuracies) == 1
    assert uniformity(test, chunk_size=chunk_size) == pytest.approx(uniformity(test, chunk_size=100_000), abs=1e-12)
    assert effective_rank(test, chunk_size=chunk_size) == pytest.approx(effective_rank(test), abs=1e-9)


def test_labels_may_be_any_integers_and_the_smallest_wins_a_tie():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([7, -3, 100])
    for query, k, label in (([1.0, 0.0], 2, -3), ([0.1, 2.0], 3, 100)):
        assert knn_accuracy(train, labels, torch.tensor([query]), torch.tensor([label]), k=k) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_neither_length_nor_type_of_a_feature_matters_and_a_low_temperature_does_not_overflow(labelled, dtype):
    train, labels, test, wanted = labelled
    low = knn_accuracy(train, labels, test, wanted, temperature=1e-3)
    assert knn_accuracy(1e4 * train, labels, 1e-4 * test, wanted, temperature=1e-3) == low
    assert knn_accuracy(train, labels, test, wanted, temperature=1e-6) == knn_accuracy(train, labels, test, wanted, k=1)
    train, test = train.to(dtype), test.to(dtype)
    assert knn_accuracy(train, labels, test, wanted) == knn_accuracy(train.float(), labels, test.float(), wanted)


def test_effective_rank_follows_its_equation():
    features = torch.randn(200, 24) @ torch.diag(torch.linspace(0.01, 3, 24))
    sigma = torch.linalg.svdvals(features.double())
    p = [s / sigma.sum().item() for s in sigma.tolist()]
    assert effective_rank(features) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)), rel=1e-6)
    assert effective_rank(torch.zeros(10, 4)) == 1


def test_uniformity_follows_its_equation():
    x = torch.randn(50, 8)
    unit_x = F.normalize(x)
    for t in (2.0, 0.5):
        expected = torch.pdist(unit_x, p=2).pow(2).mul(-t).exp().mean().log()  # the code of Wang and Isola
        assert uniformity(5 * x, t=t) == pytest.approx(expected.item(), rel=1e-5)


def test_a_collapse_is_told_with_the_effective_rank():
    collapsed = torch.randn(64).expand(100, 64) + 1e-4 * torch.randn(100, 64)
    message = collapse_warning(collapsed)
    assert f"{effective_rank(collapsed):.3f}" in message and "collapsed" in message and "\n" not in message
    assert collapse_warning(1.0) is not None and collapse_warning(math.nan) is not None
    assert collapse_warning(torch.randn(100, 64)) is None and collapse_warning(5.0) is None


@pytest.mark.parametrize("chunk_size", [3, 1024])
def test_view_retrieval_equals_a_loop_over_all_views(chunk_size):
    n, q, d = 15, 3, 4
    features = torch.randn(n, 1, d) + 0.7 * torch.randn(n, q, d)
    units = features / features.norm(dim=-1, keepdim=True)
    right = 0
    for i in range(n):
        for k in range(q):
            others = [(float(units[i, k] @ units[j, m]), j) for j in range(n) for m in range(q) if (j, m) != (i, k)]
            right += max(others)[1] == i
    assert 0 < right < n * q and view_retrieval(features, chunk_size=chunk_size) == right / (n * q)


def test_what_cannot_be_measured_is_refused():
    train, labels, test = torch.randn(50, 8), torch.zeros(50), torch.randn(9, 8)
    nan, zeros = torch.full((50, 8), math.nan), torch.zeros(9)
    for call, message in (
        (lambda: knn_accuracy(train, labels, test, zeros, k=51), "k must be 1 to 50, .*, got 51"),
        (lambda: knn_accuracy(train, labels, test, zeros, k=0), "k must be 1 to 50, .*, got 0"),
        (lambda: knn_accuracy(train, labels, test, zeros, temperature=0.0), "above 0, got 20, 0.0"),
        (lambda: knn_accuracy(train, labels[:3], test, zeros), r"train_features must be .*, got \(50, 8\) .*, got \(3,\)"),
        (lambda: knn_accuracy(train, labels, test, labels), r"test_features must be .*, got \(9, 8\) .*, got \(50,\)"),
        (lambda: knn_accuracy(train[0], labels, test, zeros), r"\(N, D\) with N >= 1, got"),
        (lambda: knn_accuracy(nan, labels, test, zeros), "NaN or infinite"),
        (lambda: knn_accuracy(train, labels, nan[:9] * math.inf, zeros), "NaN or infinite"),
        (lambda: effective_rank(train[:0]), "N >= 1"),
        (lambda: effective_rank(nan), "NaN or infinite"),
        (lambda: uniformity(train[:1]), "N >= 2"),
        (lambda: view_retrieval(torch.randn(1, 5, 3)), r"N and Q >= 2, got \(1, 5, 3\)"),
        (lambda: view_retrieval(torch.full((3, 3, 3), math.nan)), "NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
