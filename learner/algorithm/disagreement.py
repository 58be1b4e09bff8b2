"""What several critics say beside their mean value: where they differ, and what that does to the policy's loss.

AsyPPO (arXiv 2510.01656) trains M critics on disjoint parts of every group, and takes sigma_t, the standard deviation
of their values of a state, for how uncertain the future is there. Where they agree, the state is known, and its
advantage is left out; where they differ most, what follows has little to do with the outcome, and is not to be
explored. The paper's critics are updated before they are asked; here values are those of the start of the step, as with
one critic.

Axes: T response tokens of a batch or of a share, M critics.
"""

import torch
from torch import Tensor, nn

from common.config import AlgorithmConfig


def members(network: nn.Module) -> list[nn.Module]:
    """The critics in what the trainer calls the critic: one, or a list of several."""
    return list(network) if isinstance(network, nn.ModuleList) else [network]


def aggregate(values_TM: Tensor) -> tuple[Tensor, Tensor | None]:
    """(mean, standard deviation) of the critics' values, (T,) each; the second with divisor M, None for M = 1."""
    if values_TM.shape[1] == 1:
        return values_TM[:, 0], None
    return values_TM.mean(dim=1), values_TM.std(dim=1, correction=0)


def least(sigma_T: Tensor, mask_T: Tensor, share: float) -> Tensor:
    """The floor(share * n) of the n tokens in the mask where sigma is smallest, bool (T,), 0 < share < 1.

    Tokens that are equal at the edge are left out, all of them: critics that nobody has trained agree everywhere.
    """
    sorted_N = sigma_T[mask_T].sort().values
    if not len(sorted_N):
        return torch.zeros_like(mask_T)
    return mask_T & (sigma_T < sorted_N[int(share * len(sorted_N))])


def most(sigma_T: Tensor, mask_T: Tensor, share: float) -> Tensor:
    """The same where sigma is largest."""
    return least(-sigma_T, mask_T, share)


def masked(
    algorithm: AlgorithmConfig, advantages_T: Tensor | None, sigma_T: Tensor | None, mask_T: Tensor
) -> Tensor | None:
    """The advantages of the whole batch, (T,), 0 on the share algorithm.agreement_mask where critics agree best.

    Such tokens stay in the mean of the loss, and in its other terms.
    """
    if algorithm.agreement_mask is None or advantages_T is None:
        return advantages_T
    assert sigma_T is not None, "one critic does not disagree"
    return torch.where(least(sigma_T, mask_T, algorithm.agreement_mask), 0.0, advantages_T)


def entropy_mask(algorithm: AlgorithmConfig, sigma_T: Tensor | None, mask_T: Tensor) -> Tensor | None:
    """Tokens whose entropy enters the loss, bool (T,): without the share algorithm.entropy_filter where critics agree
    least. None: all of mask_T."""
    if algorithm.entropy_filter is None:
        return None
    assert sigma_T is not None, "one critic does not disagree"
    return mask_T & ~most(sigma_T, mask_T, algorithm.entropy_filter)


def metrics(algorithm: AlgorithmConfig, sigma_T: Tensor | None, mask_T: Tensor) -> dict[str, float]:
    """Of several critics before the step: how far they differ, and how many tokens get no advantage for it."""
    if sigma_T is None or not mask_T.any():
        return {}
    found = {"critic/disagreement_mean": sigma_T[mask_T].mean().item()}
    if algorithm.agreement_mask is not None:
        agreed_T = least(sigma_T, mask_T, algorithm.agreement_mask)
        found["critic/agreement_fraction"] = (agreed_T.sum() / mask_T.sum()).item()
    return found
