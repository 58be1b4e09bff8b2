"""One pass of a backbone over a packed stream: the hidden states that predict its response tokens.

Axes: S and T as in learner/algorithm/packing.py, U distinct response tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from learner.algorithm.packing import prediction_positions
from learner.networks.attention import Packing
from learner.networks.prefixes import shared_prefixes

DUMMY_LENGTH = 2  # one prompt token and one response token stand in for an empty micro-batch


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a backbone makes of a packed stream, on its device. U: distinct response tokens, T without shared prefixes:
    one has the same tokens before it, and the same log-prob and value, wherever it stands."""

    hidden_UD: Tensor  # at the position that predicts each
    targets_U: Tensor
    to_T: Tensor | None  # int64, which of them each response token is; None: U is T

    def per_token(self, outputs_U: Tensor) -> Tensor:
        return outputs_U if self.to_T is None else outputs_U.index_select(0, self.to_T)


def read(
    backbone: nn.Module,
    token_ids_S: Tensor,
    cu_seqlens_B1: Tensor,
    prompt_lengths_B: Tensor,
    shares_prefixes: bool = False,
) -> Reading:
    """The stream's reading; a dummy sequence's when it is empty."""
    device = _device_of(backbone)
    if len(prompt_lengths_B) == 0:
        token_ids_S = token_ids_S.new_zeros(DUMMY_LENGTH)
        cu_seqlens_B1 = cu_seqlens_B1.new_tensor([0, DUMMY_LENGTH])
        prompt_lengths_B = cu_seqlens_B1.new_tensor([DUMMY_LENGTH - 1])
    token_ids_S, cu_seqlens_B1, prompt_lengths_B = (x.cpu() for x in (token_ids_S, cu_seqlens_B1, prompt_lengths_B))
    positions_U = prediction_positions(cu_seqlens_B1, prompt_lengths_B)
    targets_U, to_T = token_ids_S[positions_U + 1], None
    if shares_prefixes:
        prefixes = shared_prefixes(token_ids_S, cu_seqlens_B1)
        packing = Packing.from_prefixes(prefixes, device)
        token_ids_S = token_ids_S[prefixes.kept_C]
        positions_U, targets_U, to_T = _distinct(prefixes.places_S[positions_U], targets_U)
        to_T = to_T.to(device)
    else:
        packing = Packing.from_lengths(cu_seqlens_B1.diff().tolist(), device)
    output = backbone(
        input_ids=token_ids_S.to(device)[None],
        position_ids=packing.position_ids_S[None],
        use_cache=False,
        packing=packing,
    )
    hidden_UD = output.last_hidden_state[0].index_select(0, positions_U.to(device))
    return Reading(hidden_UD=hidden_UD, targets_U=targets_U.to(device), to_T=to_T)


def _distinct(places_T: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(place that predicts it, token) of each distinct response token, and which of them each response token is."""
    num_tokens = int(targets_T.max()) + 1
    distinct_U, to_T = (places_T * num_tokens + targets_T).unique(return_inverse=True)
    return distinct_U // num_tokens, distinct_U % num_tokens, to_T


def _device_of(network: nn.Module) -> torch.device:
    """Where it computes, offloaded or not."""
    parameter = next(network.parameters())
    return torch.device(parameter.device_mesh.device_type) if isinstance(parameter, DTensor) else parameter.device
