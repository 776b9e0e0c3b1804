"""How far features have moved from what they were: the same images before and after further training.

Shapes: N images, D width of a feature before, E after.
"""

import torch.nn.functional as F
from torch import Tensor


def mean_cosine(before: Tensor, after: Tensor) -> float:
    """Give the mean cosine between the features of an image before and after: 1 where no direction has changed.

    Args:
        before: (N, D).
        after: of the same images in the same order, (N, D).

    Raises:
        ValueError: if they are no pairs.
    """
    if before.shape != after.shape or before.ndim != 2:
        raise ValueError(f"{tuple(before.shape)} and {tuple(after.shape)} features are no pairs: the same (N, D) is expected")
    return float(F.cosine_similarity(before.double(), after.double(), dim=1).mean())


def linear_cka(before: Tensor, after: Tensor) -> float:
    """Give how alike two sets of features tell images apart: linear CKA (Kornblith et al., 2019), 0 to 1.

    Unlike `mean_cosine` it does not see rotations and a scale common to all features, which no k-NN test or linear probe
    minds. 0 where one of them is the same for all images.

    Args:
        before: (N, D).
        after: of the same images in the same order, (N, E).

    Raises:
        ValueError: if they are not of the same images.
    """
    if before.ndim != 2 or after.ndim != 2 or len(before) != len(after):
        raise ValueError(f"{tuple(before.shape)} and {tuple(after.shape)} features are not of the same N images")
    x, y = (features.double() - features.double().mean(dim=0) for features in (before, after))
    norms = (x.T @ x).norm() * (y.T @ y).norm()
    return float((y.T @ x).square().sum() / norms) if norms > 0 else 0.0
