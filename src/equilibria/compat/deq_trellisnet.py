"""DEQ-TrellisNets of the first public code, version 1 (.pkl)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from equilibria.compat.tensors import OldTensors
from equilibria.core.errors import UserError
from equilibria.models.deq_trellisnet import DEQTrellisNetConfig

_CELL = "deq.cell"


def is_trellisnet(old: OldTensors) -> bool:
    """Whether a checkpoint is one."""
    return any(name.startswith("trellisnet.") for name in old.tensors)


def convert_trellisnet(
    old: OldTensors, config: DEQTrellisNetConfig
) -> tuple[DEQTrellisNetConfig, dict[str, Tensor]]:
    """Configuration and weights of the same model here.

    What the tensors tell (widths, weight norm, mixture of softmaxes) replaces what is in `config`;
    dropouts are taken from it.

    Raises:
        UserError: tensors are missing, foreign, or make a model that we do not have.
    """
    # DropConnect wraps the network once more.
    wrapped = any(name.startswith("trellisnet.module.") for name in old.tensors)
    net = "trellisnet.module" if wrapped else "trellisnet"
    embedding = old.take("encoder.weight", "embedding.weight")
    d_embed = embedding.shape[1]
    convolution, injection = f"{net}.func.full_conv", f"{net}.inject_conv"
    weight_norm = f"{convolution}.weight_g" in old.tensors
    here = f"{_CELL}.convolution.weight"
    weights: dict[str, Tensor] = {"embedding.weight": embedding}
    if weight_norm:
        v, g = old.direction_and_length(f"{convolution}.weight", here)
        split = f"{_CELL}.convolution.parametrizations.weight"
        weights[f"{split}.original0"] = g.reshape(-1, 1)
        weights[f"{split}.original1"] = _two_taps(v, convolution)
    else:
        v = old.weight(f"{convolution}.weight", here)
        weights[here] = _two_taps(v, convolution)
    name = f"{_CELL}.injection"
    weights[f"{name}.weight"] = _two_taps(
        old.weight(f"{injection}.weight", f"{name}.weight"), injection
    )
    weights[f"{name}.bias"] = old.take(f"{injection}.bias", f"{name}.bias, summed") + old.take(
        f"{convolution}.bias", f"{name}.bias, summed"
    )
    num_softmaxes = _softmax(old, weights, embedding)
    for copied in (f"{net}.func_copy.", f"{net}.deq.", f"{net}.deqback."):
        old.leave(copied, "a copy of the cell")
    old.check_all_used()
    made = replace(
        config,
        d_embed=d_embed,
        d_hidden=v.shape[1] - d_embed,
        weight_norm=weight_norm,
        num_softmaxes=num_softmaxes,
        remember_input=False,
    )
    return made, weights


def _softmax(old: OldTensors, weights: dict[str, Tensor], embedding: Tensor) -> int:
    if not torch.equal(old.take("decoder.weight", "embedding.weight, shared"), embedding):
        raise UserError(
            "decoder.weight is not encoder.weight: the softmax has weights of its own, and ours "
            "shares them with the embedding. Models trained with --not_tied cannot be converted"
        )
    bias = old.take("decoder.bias", "bias of the softmax")
    if "mixsoft.prior.weight" not in old.tensors:
        weights["output_bias"] = bias
        return 1
    weights["mixture.bias"] = bias
    for layer in ("prior", "latent"):
        for part in ("weight", "bias"):
            becomes = f"mixture.{layer}.{part}"
            weights[becomes] = old.take(f"mixsoft.{layer}.{part}", becomes)
    old.leave("mixsoft.decoder.", "a second name of the softmax")
    return len(weights["mixture.prior.bias"])


def _two_taps(kernel: Tensor, name: str) -> Tensor:
    """A kernel (out, in, 2) as a matrix on the position before, and the position itself."""
    if kernel.dim() != 3 or kernel.shape[2] != 2:
        raise UserError(
            f"the kernel of {name} has shape {tuple(kernel.shape)}, and only kernels of two "
            "positions are converted"
        )
    return torch.cat((kernel[..., 0], kernel[..., 1]), dim=1)
