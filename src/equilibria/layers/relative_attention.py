"""Multi-head attention with the relative positions of Transformer-XL, on fused kernels.

Shape suffixes: B batch, L queries, K keys (memory and queries), H heads, E width of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sinusoids(num_positions: int, width: int, like: Tensor) -> Tensor:
    """Sinusoidal embedding of the distances num_positions-1, ..., 1, 0: (num_positions, width).

    The first half of the columns are sines, the second cosines, of distance / 10000^(2i/width).

    Source: Dai et al., Transformer-XL, arXiv 1901.02860, section 3.3.
    """
    distances = torch.arange(num_positions - 1, -1, -1, device=like.device, dtype=torch.float32)
    exponents = torch.arange(0, width, 2, device=like.device, dtype=torch.float32) / width
    angles = distances.unsqueeze(1) * torch.pow(10000.0, -exponents).unsqueeze(0)
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :width].to(like.dtype)


def relative_shift(scores_BHLK: Tensor) -> Tensor:
    """Move scores from "by distance" to "by key" without a gather.

    Column c of the input belongs to distance K - 1 - c; in the output, entry (i, j) belongs to
    the distance between query i and key j, (K - L + i) - j. Entries with j in the future of i are
    meaningless and must be masked.
    """
    *lead, num_queries, num_keys = scores_BHLK.shape
    if num_queries == 1:
        return scores_BHLK  # in order already
    padded = F.pad(scores_BHLK, (1, 0))
    return padded.reshape(*lead, num_keys + 1, num_queries)[..., 1:, :].reshape(
        *lead, num_queries, num_keys
    )


def future_mask(
    num_queries: int, num_keys: int, device: torch.device, window: int | None = None
) -> Tensor:
    """True where key j lies in the future of query i, (L, K); the queries are the last keys.

    With a window also where it lies `window` positions or more in the past.
    """
    i = torch.arange(num_queries, device=device).unsqueeze(1) + num_keys - num_queries
    j = torch.arange(num_keys, device=device).unsqueeze(0)
    return j > i if window is None else (j > i) | (i - j >= window)


def relative_attention(
    q_BHLE: Tensor,
    k_BHKE: Tensor,
    v_BHKE: Tensor,
    position_HKE: Tensor,
    content_bias_HE: Tensor,
    position_bias_HE: Tensor,
    future_LK: Tensor,
    weight_mask_BHLK: Tensor | None = None,
) -> Tensor:
    """Causal attention (B, H, L, E) whose scores depend on content and on distance.

        score(i, j) = ((q_i + u) . k_j + (q_i + v) . p_{i-j}) / sqrt(E)

    The second term is handed to PyTorch's scaled_dot_product_attention as an additive mask, so
    that the product with the values runs in its fused kernels. A mask that the weights are
    multiplied with (variational dropout) keeps the matrix of weights in memory.

    Source: Dai et al., Transformer-XL, arXiv 1901.02860, section 3.3 and appendix B.
    """
    scale = 1.0 / math.sqrt(q_BHLE.shape[-1])
    query_by_distance = (q_BHLE + position_bias_HE.unsqueeze(1)) * scale
    by_distance = query_by_distance @ position_HKE.transpose(-1, -2)
    bias = relative_shift(by_distance).masked_fill(future_LK, -torch.inf)
    query = q_BHLE + content_bias_HE.unsqueeze(1)
    if weight_mask_BHLK is None:
        return F.scaled_dot_product_attention(query, k_BHKE, v_BHKE, attn_mask=bias, scale=scale)
    weights = (query @ k_BHKE.transpose(-1, -2) * scale + bias).softmax(-1)
    return (weights * weight_mask_BHLK) @ v_BHKE


def relative_attention_of_next(
    q_BHLE: Tensor,
    k_BHLE: Tensor,
    v_BHLE: Tensor,
    past_k_BHME: Tensor,
    past_v_BHME: Tensor,
    position_HKE: Tensor,
    content_bias_HE: Tensor,
    position_bias_HE: Tensor,
    hidden_LK: Tensor,
) -> Tensor:
    """The same for one new position (L = 1) after M others, which are not copied (K = M + 1).

    Where keys and values of a text stay and those of one position change from evaluation to
    evaluation, putting them in one tensor costs more than the attention.
    """
    scale = 1.0 / math.sqrt(q_BHLE.shape[-1])
    query = (q_BHLE + content_bias_HE.unsqueeze(1)) * scale
    by_content = torch.cat(
        (query @ past_k_BHME.transpose(-1, -2), (query * k_BHLE).sum(-1, keepdim=True)), dim=-1
    )
    # One query has its distances in the order of its keys, so that nothing is to be shifted.
    by_distance = (q_BHLE + position_bias_HE.unsqueeze(1)) * scale @ position_HKE.transpose(-1, -2)
    weights = (by_content + by_distance).masked_fill(hidden_LK, -torch.inf).softmax(-1)
    return weights[..., :-1] @ past_v_BHME + weights[..., -1:] * v_BHLE
