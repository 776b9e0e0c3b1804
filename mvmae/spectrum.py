"""Two measures of features without labels, from the spectrum of their covariance: LiDAR and alpha-ReQ.

Shapes: N images, Q views of each, D width of a feature.
"""

import torch
from torch import Tensor

FIRST, LAST = 11, 100
"""Eigenvalues, counted from 1, over which `alpha_req` fits (Stringer et al., 2019, fit from the 11th on)."""


def lidar(features: Tensor, *, delta: float = 1e-4) -> float:
    """Compute the number of directions in which images differ more than their views do: LiDAR (Thilak et al., 2024).

    exp(-sum_i p_i log p_i) with p_i = lambda_i / sum_j lambda_j, the eigenvalues of W^-1/2 B W^-1/2. B is the covariance of
    the images' mean features, W the mean covariance of the views of an image, plus ``delta`` on its diagonal (arXiv
    2312.04000). 1 where all images differ along one direction, at most min(N - 1, D). In float64.

    Args:
        features: of Q >= 2 random views of each of N >= 2 images, (N, Q, D); in the paper N = 1000 and Q = 50.
        delta: above 0, in the units of the features squared; keeps W invertible.

    Raises:
        ValueError: if there are too few images or views, or a feature is not finite.
    """
    if features.ndim != 3 or min(features.shape[:2]) < 2:
        raise ValueError(f"features must have the shape (N, Q, D) with N and Q >= 2, got {tuple(features.shape)}")
    if not delta > 0:
        raise ValueError(f"delta must be above 0, got {delta}")
    values = _finite(features)
    means = values.mean(dim=1)  # (N, D)
    within, between = (values - means[:, None]).flatten(0, 1), means - means.mean(dim=0)
    number, views, width = values.shape
    cov_within = within.T @ within / (number * (views - 1)) + delta * torch.eye(width, dtype=values.dtype, device=values.device)
    cov_between = between.T @ between / (number - 1)
    variances, directions = torch.linalg.eigh(cov_within)
    whitened = directions / variances.sqrt() @ directions.T  # W^-1/2
    eigenvalues = torch.linalg.eigvalsh(whitened @ cov_between @ whitened).clamp(min=0)
    p: Tensor = eigenvalues / eigenvalues.sum().clamp(min=torch.finfo(eigenvalues.dtype).tiny)
    return float(torch.special.entr(p).sum().exp())


def alpha_req(features: Tensor, *, first: int = FIRST, last: int = LAST) -> float:
    """Compute how fast the variance of features decays over their directions: alpha-ReQ (Agrawal et al., 2022).

    The exponent alpha of lambda_j ~ j^-alpha, the eigenvalues of the covariance in falling order, by least squares on
    logarithms with weights 1 / j (Stringer et al., 2019). Large where few directions hold the variance, 0 where all hold
    alike; the authors find features best near 1. In float64.

    Args:
        features: (N, D) with N >= 2.
        first: first eigenvalue of the fit, from 1 on; where there are fewer than twice as many, the first tenth is left out.
        last: last one, at most as many as there are above rounding error, min(N - 1, D) at most.

    Raises:
        ValueError: if fewer than three eigenvalues remain, or a feature is not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must have the shape (N, D) with N >= 2, got {tuple(features.shape)}")
    values = _finite(features)
    centred = values - values.mean(dim=0)
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred / (len(values) - 1)).flip(0)  # falling
    number = int((eigenvalues > eigenvalues[0].abs() * 1e-10).sum())
    last = min(last, number, len(values) - 1)
    first = first if last >= 2 * first else last // 10 + 1
    if last - first < 2:
        raise ValueError(
            f"features must vary in three directions at least to fit a decay, got {number} of {len(values)} images: "
            "use more images, or has the encoder collapsed?"
        )
    j = torch.arange(first, last + 1, dtype=values.dtype, device=values.device)
    weights = 1 / j
    x, y = -j.log(), eigenvalues[first - 1 : last].log()
    x, y = x - (weights * x).sum() / weights.sum(), y - (weights * y).sum() / weights.sum()
    return float((weights * x * y).sum() / (weights * x * x).sum())


def _finite(features: Tensor) -> Tensor:
    if not features.isfinite().all():
        raise ValueError("a feature is NaN or infinite: the encoder has diverged, or its images are not normalised")
    return features.detach().cpu().double()  # not all devices have float64
