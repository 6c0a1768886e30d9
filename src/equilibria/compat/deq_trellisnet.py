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
    tokens, d_embed = old.tell("encoder.weight", "tokens", "width")
    embedding = old.take("encoder.weight", "embedding.weight", (tokens, d_embed))
    convolution, injection = f"{net}.func.full_conv", f"{net}.inject_conv"
    width = _width(old, f"{convolution}.weight", d_embed)
    weight_norm = f"{convolution}.weight_g" in old.tensors
    here, shape = f"{_CELL}.convolution", (4 * width, width, 2)
    weights: dict[str, Tensor] = {"embedding.weight": embedding}
    if weight_norm:
        v, g = old.direction_and_length(f"{convolution}.weight", f"{here}.weight", shape)
        split = f"{here}.parametrizations.weight"
        weights[f"{split}.original0"], weights[f"{split}.original1"] = g, _two_taps(v)
    else:
        taken = old.take(f"{convolution}.weight", f"{here}.weight", shape)
        weights[f"{here}.weight"] = _two_taps(taken)
    name, shape = f"{_CELL}.injection", (4 * width, d_embed, 2)
    taken = old.weight(f"{injection}.weight", f"{name}.weight", shape)
    weights[f"{name}.weight"] = _two_taps(taken)
    injected, convolved = (
        old.take(f"{layer}.bias", f"{name}.bias, summed", (4 * width,))
        for layer in (injection, convolution)
    )
    weights[f"{name}.bias"] = injected + convolved
    num_softmaxes = _softmax(old, weights, embedding)
    for copied in (f"{net}.func_copy.", f"{net}.deq.", f"{net}.deqback."):
        old.leave(copied, "a copy of the cell")
    old.check_all_used()
    made = replace(
        config,
        d_embed=d_embed,
        d_hidden=width - d_embed,
        weight_norm=weight_norm,
        num_softmaxes=num_softmaxes,
        remember_input=False,
    )
    return made, weights


def _width(old: OldTensors, name: str, d_embed: int) -> int:
    """Of the state, as the kernel tells."""
    name = old.held(name)
    outputs, width, positions = old.tell(name, "4 x width", "width", "positions")
    shape = (outputs, width, positions)
    if positions != 2:
        raise UserError(
            f"{name} has shape {shape}, and only kernels of two positions are converted, of shape "
            f"{(outputs, width, 2)}"
        )
    if outputs != 4 * width or width <= d_embed:
        raise UserError(
            f"{name} has shape {shape} where (4 x width, width, 2) is needed, with a width above "
            f"the {d_embed} of encoder.weight {old.told['encoder.weight']}; the checkpoint is "
            "damaged or belongs to another model"
        )
    return width


def _softmax(old: OldTensors, weights: dict[str, Tensor], embedding: Tensor) -> int:
    """Put the softmax beside the other weights; how many are mixed."""
    tokens, width = embedding.shape
    shared = old.take("decoder.weight", "embedding.weight, shared", (tokens, width))
    if not torch.equal(shared, embedding):
        raise UserError(
            "decoder.weight is not encoder.weight: the softmax has weights of its own, and ours "
            "shares them with the embedding. Models trained with --not_tied cannot be converted"
        )
    bias = old.take("decoder.bias", "bias of the softmax", (tokens,))
    if not any(name.startswith("mixsoft.") for name in old.tensors):
        weights["output_bias"] = bias
        return 1
    weights["mixture.bias"] = bias
    (number,) = old.tell("mixsoft.prior.bias", "experts")
    for layer, rows in (("prior", number), ("latent", number * width)):
        for part, shape in (("weight", (rows, width)), ("bias", (rows,))):
            becomes = f"mixture.{layer}.{part}"
            weights[becomes] = old.take(f"mixsoft.{layer}.{part}", becomes, shape)
            if number == 1:
                # Ours of one has no tanh(W h). Two that are equal are one, whatever their shares.
                weights[becomes] = weights[becomes].repeat(2, *[1] * (len(shape) - 1))
                old.mapped[f"mixsoft.{layer}.{part}"] = f"{becomes}, twice"
    old.leave("mixsoft.decoder.", "a second name of the softmax")
    return max(number, 2)


def _two_taps(kernel: Tensor) -> Tensor:
    """A kernel (out, in, 2) as a matrix on the position before, and the position itself."""
    return torch.cat((kernel[..., 0], kernel[..., 1]), dim=1)
