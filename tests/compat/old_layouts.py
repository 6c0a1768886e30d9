"""State dicts in the layouts of the first public code, with random weights."""

from __future__ import annotations

import torch
from torch import Tensor

Old = dict[str, Tensor]
D, HEADS, INNER, V = 8, 2, 12, 20


def drawn(*shape: int, scale: float = 0.4) -> Tensor:
    return scale * torch.randn(*shape)


def layer(old: Old, name: str, shape: tuple[int, ...], *, normed: bool, bias: bool = True) -> None:
    """A weight (and bias), split by weight norm or not."""
    if normed:
        old[f"{name}.weight_g"] = 0.5 + torch.rand(shape[0], *[1] * (len(shape) - 1))
        old[f"{name}.weight_v"] = drawn(*shape)
    else:
        old[f"{name}.weight"] = drawn(*shape)
    if bias:
        old[f"{name}.bias"] = drawn(shape[0])


def transformer(*, version: int = 2, normed: bool = True, adaptive: bool = True) -> Old:
    """Version 1 has convolutions for the feed-forward layer, and copies of the block."""
    torch.manual_seed(version)
    old: Old = {}
    edges, widths = ([0, 4, 9, V], [8, 4, 2]) if adaptive else ([0, V], [D])
    for i, width in enumerate(widths):
        old[f"word_emb.emb_layers.{i}.weight"] = drawn(edges[i + 1] - edges[i], width)
        if adaptive:
            old[f"word_emb.emb_projs.{i}.weight"] = drawn(D, width)
    layer(old, "inject_conv", (3 * D, D, 1), normed=False)
    old["pos_emb.inv_freq"] = torch.ones(D // 2)
    tail = (1,) if version == 1 else ()
    layer(old, "func.dec_attn.qkv_net", (3 * D, D, 1), normed=normed, bias=False)
    layer(old, "func.dec_attn.r_net", (D, D, 1), normed=normed, bias=False)
    layer(old, "func.dec_attn.o_net", (D, D, 1), normed=normed)
    for name in ("r_w_bias", "r_r_bias"):
        old[f"func.dec_attn.{name}"] = drawn(HEADS, D // HEADS)
    layer(old, "func.pos_ff.ff1_net", (INNER, D, *tail), normed=normed)
    layer(old, "func.pos_ff.ff2_net", (D, INNER, *tail), normed=normed)
    if version == 1:
        for name in [name for name in old if name.startswith("func.")]:
            old[f"func_copy.{name.removeprefix('func.')}"] = old[name].clone()
            old[f"deq.{name}"] = old[name]
    for i in range(len(widths)):
        old[f"crit.out_layers.{i}.weight"] = old[f"word_emb.emb_layers.{i}.weight"]
        old[f"crit.out_layers.{i}.bias"] = drawn(edges[i + 1] - edges[i])
        if adaptive:  # the first one is its own
            shared = old[f"word_emb.emb_projs.{i}.weight"]
            old[f"crit.out_projs.{i}.weight"] = shared if i else drawn(D, widths[0])
    if adaptive:
        old["crit.cluster_weight"], old["crit.cluster_bias"] = drawn(2, widths[0]), drawn(2)
    calm(old)
    return old


def calm(old: Old) -> None:
    """Let the input speak and z whisper, so that there is an equilibrium to be found."""
    for name, factor in (
        ("func.dec_attn.qkv_net.weight", 0.2),
        ("func.pos_ff.ff2_net.weight", 0.3),
    ):
        for key in (name, f"{name}_g"):
            if key in old:
                old[key] *= factor


def trellisnet(*, normed: bool = True, experts: int = 0, dropped: bool = False) -> Old:
    """With DropConnect a wrapper adds `module` to names and `_raw` to what it drops."""
    torch.manual_seed(3)
    embed, hidden = 4, 6
    width = embed + hidden
    old: Old = {"encoder.weight": drawn(V, embed, scale=1.0)}
    old["decoder.weight"], old["decoder.bias"] = old["encoder.weight"], drawn(V)
    net = "trellisnet.module" if dropped else "trellisnet"
    layer(old, f"{net}.func.full_conv", (4 * width, width, 2), normed=normed)
    layer(old, f"{net}.inject_conv", (4 * width, embed, 2), normed=normed)
    for name in ("weight", "bias"):
        old[f"{net}.func_copy.full_conv.{name}"] = torch.zeros(1)
    if dropped:
        for name in ("func.full_conv", "inject_conv"):
            suffix = "_v" if normed else ""
            old[f"{net}.{name}.weight{suffix}_raw"] = old.pop(f"{net}.{name}.weight{suffix}")
    if experts:
        old["mixsoft.prior.weight"], old["mixsoft.prior.bias"] = (
            drawn(experts, embed),
            drawn(experts),
        )
        old["mixsoft.latent.weight"] = drawn(experts * embed, embed)
        old["mixsoft.latent.bias"] = drawn(experts * embed)
        old["mixsoft.decoder.weight"], old["mixsoft.decoder.bias"] = (
            old["decoder.weight"], old["decoder.bias"],
        )  # fmt: skip
    return old


def torchdeq(*, normed: bool = True, blocks: int = 2) -> Old:
    """The language model of torchdeq's collection, whose softmax has the projections of all."""
    torch.manual_seed(5)
    old: Old = {}
    edges, widths = [0, 4, 9, V], [8, 4, 2]
    for i, width in enumerate(widths):
        old[f"word_emb.emb_layers.{i}.weight"] = drawn(edges[i + 1] - edges[i], width)
        old[f"word_emb.emb_projs.{i}.weight"] = drawn(D, width)
    old["pos_emb.inv_freq"] = torch.ones(D // 2)
    layer(old, "injection", (3 * D, D), normed=False)
    for block in range(blocks):
        attention, feed = f"func.dec_attn.{block}", f"func.pos_ff.{block}"
        for name in ("r_w_bias", "r_r_bias"):
            old[f"{attention}.{name}"] = drawn(HEADS, D // HEADS)
        layer(old, f"{attention}.qkv_net", (3 * D, D), normed=normed, bias=False)
        layer(old, f"{attention}.r_net", (D, D), normed=normed, bias=False)
        layer(old, f"{attention}.o_net", (D, D), normed=normed)
        layer(old, f"{feed}.ff1_net", (INNER, D), normed=normed)
        layer(old, f"{feed}.ff2_net", (D, INNER), normed=normed)
        for name in (f"{attention}.ln1", f"{attention}.ln2", f"{feed}.ln"):
            old[f"{name}.weight"], old[f"{name}.bias"] = 1.0 + drawn(D), drawn(D)
    for i in range(len(widths)):
        old[f"crit.out_layers.{i}.weight"] = old[f"word_emb.emb_layers.{i}.weight"]
        old[f"crit.out_layers.{i}.bias"] = drawn(edges[i + 1] - edges[i])
        shared = old[f"word_emb.emb_projs.{i}.weight"]
        old[f"crit.out_projs.{i}.weight"] = shared if i else drawn(D, widths[0])
    old["crit.cluster_weight"], old["crit.cluster_bias"] = drawn(2, widths[0]), drawn(2)
    return old
