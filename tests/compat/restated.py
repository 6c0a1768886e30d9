"""The published models, restated plainly from their equations, on tensors in the old layout.

Independent of the library: no weight norm modules, no solver, no fused attention. Everything is one
sample, (length, width), in float64, and equilibria are found by damped iteration.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Old = dict[str, Tensor]


def effective(old: Old, name: str) -> Tensor:
    """A weight, or direction times length over norm, as a matrix (or kernel)."""
    if name in old:
        return old[name].double()
    v, g = old[f"{name}_v"].double(), old[f"{name}_g"].double()
    norms = v.reshape(len(v), -1).norm(dim=1).reshape(g.shape)
    return v * g / norms


def matrix(old: Old, name: str) -> Tensor:
    weight = effective(old, name)
    return weight.reshape(weight.shape[0], -1)


def norm(x: Tensor) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()


def iterate(f, z, steps=3000, damping=0.5):
    for _ in range(steps):
        new = (1 - damping) * z + damping * f(z)
        if (new - z).norm() <= 1e-14 * new.norm():
            return new
        z = new
    return z


# --- Transformer -------------------------------------------------------------------------------


def embed(old: Old, tokens: Tensor) -> Tensor:
    d_model = old["inject_conv.weight"].shape[1]
    rows = []
    for token in tokens.tolist():
        cluster, begin = 0, 0
        while token - begin >= len(old[f"word_emb.emb_layers.{cluster}.weight"]):
            begin += len(old[f"word_emb.emb_layers.{cluster}.weight"])
            cluster += 1
        vector = old[f"word_emb.emb_layers.{cluster}.weight"][token - begin].double()
        if f"word_emb.emb_projs.{cluster}.weight" in old:
            vector = old[f"word_emb.emb_projs.{cluster}.weight"].double() @ vector
        rows.append(vector)
    return torch.stack(rows) * math.sqrt(d_model)


def transformer_block(old: Old, z: Tensor, u: Tensor, z0: Tensor, *, pre: bool, window: int):
    """z (L, D), injections u (M + L, 3 D), remembered z0 (M, D)."""
    attn = "func.dec_attn"
    u_bias, v_bias = (old[f"{attn}.{name}"].double() for name in ("r_w_bias", "r_r_bias"))
    heads, d_head = u_bias.shape
    length, keys = len(z), len(z) + len(z0)
    seen = torch.cat((z0, z))
    qkv = (norm(seen) if pre else seen) @ matrix(old, f"{attn}.qkv_net.weight").T + u
    q, k, v = (part.reshape(keys, heads, d_head) for part in qkv.chunk(3, 1))
    d_model = z.shape[1]
    frequencies = 10000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    attended = torch.zeros(length, heads, d_head, dtype=torch.float64)
    for i in range(length):
        at = i + len(z0)
        scores = torch.full((heads, keys), -torch.inf, dtype=torch.float64)
        for j in range(max(0, at - window + 1), at + 1):
            angles = (at - j) * frequencies
            r = torch.cat((angles.sin(), angles.cos()))
            r = (matrix(old, f"{attn}.r_net.weight") @ r).reshape(heads, d_head)
            content = ((q[at] + u_bias) * k[j]).sum(1)
            distance = ((q[at] + v_bias) * r).sum(1)
            scores[:, j] = (content + distance) / math.sqrt(d_head)
        attended[i] = torch.einsum("hj,jhd->hd", scores.softmax(1), v)
    out = attended.reshape(length, -1) @ matrix(old, f"{attn}.o_net.weight").T
    h = z + out + old[f"{attn}.o_net.bias"].double()
    h = norm(h)  # of post-norm after the attention, of pre-norm before the feed-forward layer
    inner = (
        h @ matrix(old, "func.pos_ff.ff1_net.weight").T + old["func.pos_ff.ff1_net.bias"]
    ).relu()
    h = h + inner @ matrix(old, "func.pos_ff.ff2_net.weight").T + old["func.pos_ff.ff2_net.bias"]
    return h if pre else norm(h)


def inject(old: Old, tokens: Tensor) -> Tensor:
    return (
        embed(old, tokens) @ matrix(old, "inject_conv.weight").T + old["inject_conv.bias"].double()
    )


def transformer_equilibrium(old: Old, tokens: Tensor, memory=None, *, pre=False, window=1000):
    """z* (L, D), and what the next segment needs."""
    u = inject(old, tokens)
    z0 = u.new_zeros(0, u.shape[1] // 3) if memory is None else memory[0]
    us = u if memory is None else torch.cat((memory[1], u))
    z = iterate(
        lambda z: transformer_block(old, z, us, z0, pre=pre, window=window),
        u.new_zeros(len(tokens), u.shape[1] // 3),
    )
    return z, (torch.cat((z0, z)), us)


def adaptive_log_probabilities(old: Old, hidden: Tensor) -> Tensor:
    """Clusters of the softmax; the head's column of cluster i is the i-th from the end."""
    number = sum(name.startswith("crit.out_layers.") and name.endswith("bias") for name in old)

    def logits(i: int, extra_weight=None, extra_bias=None) -> Tensor:
        weight = old[f"crit.out_layers.{i}.weight"].double()
        bias = old[f"crit.out_layers.{i}.bias"].double()
        if extra_weight is not None:
            weight, bias = torch.cat((weight, extra_weight)), torch.cat((bias, extra_bias))
        projection = old.get(f"crit.out_projs.{i}.weight")
        return (hidden if projection is None else hidden @ projection.double()) @ weight.T + bias

    if number == 1:
        return logits(0).log_softmax(1)
    head = logits(0, old["crit.cluster_weight"].double(), old["crit.cluster_bias"].double())
    head = head.log_softmax(1)
    parts = [head[:, : len(old["crit.out_layers.0.bias"])]]
    parts += [head[:, [-i]] + logits(i).log_softmax(1) for i in range(1, number)]
    return torch.cat(parts, 1)


# --- torchdeq's language model -----------------------------------------------------------------


def affine(old: Old, name: str, x: Tensor) -> Tensor:
    """Layer norm with weights."""
    return norm(x) * old[f"{name}.weight"].double() + old[f"{name}.bias"].double()


def torchdeq_block(old: Old, number: int, z: Tensor, u: Tensor, z0: Tensor, window: int) -> Tensor:
    """One block: z (L, D), injections u (M + L, 3 D), remembered z0 (M, D).

    Queries, keys and values of a head are side by side.
    """
    attn, feed = f"func.dec_attn.{number}", f"func.pos_ff.{number}"
    u_bias, v_bias = (old[f"{attn}.{name}"].double() for name in ("r_w_bias", "r_r_bias"))
    heads, d_head = u_bias.shape
    keys, d_model = len(z0) + len(z), z.shape[1]
    qkv = affine(old, f"{attn}.ln1", torch.cat((z0, z))) @ matrix(old, f"{attn}.qkv_net.weight").T
    q, k, v = (qkv + u).reshape(keys, heads, 3, d_head).unbind(2)
    frequencies = 10000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    out = []
    for at in range(len(z0), keys):
        seen = range(max(0, at - window + 1), at + 1)
        scores = []
        for j in seen:
            angles = (at - j) * frequencies
            r = matrix(old, f"{attn}.r_net.weight") @ torch.cat((angles.sin(), angles.cos()))
            r = r.reshape(heads, d_head)
            scores.append(((q[at] + u_bias) * k[j] + (q[at] + v_bias) * r).sum(1))
        shares = (torch.stack(scores) / math.sqrt(d_head)).softmax(0)
        values = torch.stack([v[j] for j in seen])
        out.append(torch.einsum("jh,jhd->hd", shares, values).flatten())
    attended = affine(old, f"{attn}.ln2", torch.stack(out))
    h = z + attended @ matrix(old, f"{attn}.o_net.weight").T + old[f"{attn}.o_net.bias"].double()
    inner = affine(old, f"{feed}.ln", h) @ matrix(old, f"{feed}.ff1_net.weight").T
    inner = (inner + old[f"{feed}.ff1_net.bias"].double()).relu()
    fed = inner @ matrix(old, f"{feed}.ff2_net.weight").T + old[f"{feed}.ff2_net.bias"].double()
    return h + fed


def torchdeq_steps(old: Old, tokens: Tensor, steps: int, memory=None, window=1000):
    """z after some steps from zero (L, D), and what the next segment needs."""
    names = {"inject_conv.weight": old["injection.weight"]}
    u = embed(old | names, tokens) @ matrix(old, "injection.weight").T
    u = u + old["injection.bias"].double()
    z = z0 = u.new_zeros(0, u.shape[1] // 3)
    us = u
    if memory is not None:
        z0, us = memory[0], torch.cat((memory[1], u))
    z = u.new_zeros(len(tokens), u.shape[1] // 3)
    blocks = sum(name.endswith("r_w_bias") for name in old)
    for _ in range(steps):
        for number in range(blocks):
            z = torchdeq_block(old, number, z, us, z0, window)
    return z, (torch.cat((z0, z)), us)


# --- TrellisNet --------------------------------------------------------------------------------


def trellis_equilibrium(old: Old, tokens: Tensor, memory=None, net="trellisnet"):
    """h*, c* (L, H)."""
    x = old["encoder.weight"].double()[tokens]
    kernel, bias = effective(old, f"{net}.func.full_conv.weight"), old[f"{net}.func.full_conv.bias"]
    inject_kernel = effective(old, f"{net}.inject_conv.weight")
    before = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
    u = before @ inject_kernel[..., 0].T + x @ inject_kernel[..., 1].T
    u = u + old[f"{net}.inject_conv.bias"].double()
    width = kernel.shape[1]
    h0, c0 = memory or (u.new_zeros(1, width), u.new_zeros(1, width))

    def f(z: Tensor) -> Tensor:
        h, c = z.chunk(2, 1)
        past_h, past_c = torch.cat((h0, h[:-1])), torch.cat((c0, c[:-1]))
        gates = u + past_h @ kernel[..., 0].T + h @ kernel[..., 1].T + bias.double()
        i, o, g, forget = gates.chunk(4, 1)
        c = forget.sigmoid() * past_c + i.sigmoid() * g.tanh()
        return torch.cat((o.sigmoid() * c.tanh(), c), 1)

    return iterate(f, u.new_zeros(len(tokens), 2 * width)).chunk(2, 1)


def trellis_log_probabilities(old: Old, h: Tensor) -> Tensor:
    width = old["encoder.weight"].shape[1]
    hidden, weight = h[:, -width:], old["decoder.weight"].double()
    bias = old["decoder.bias"].double()
    if "mixsoft.prior.weight" not in old:
        return (hidden @ weight.T + bias).log_softmax(1)
    prior = hidden @ old["mixsoft.prior.weight"].double().T + old["mixsoft.prior.bias"]
    latent = (hidden @ old["mixsoft.latent.weight"].double().T + old["mixsoft.latent.bias"]).tanh()
    total = 0.0
    for k, share in enumerate(prior.softmax(1).unbind(1)):
        part = latent[:, k * width : (k + 1) * width] @ weight.T + bias
        total = total + share.unsqueeze(1) * part.softmax(1)
    return total.log()
