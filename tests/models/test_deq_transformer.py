"""The DEQ-Transformer as a language model: causal, with memory, deterministic."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from equilibria import Anderson, Broyden, FixedSteps, Picard, Residual, SolveSettings, UserError
from equilibria.models.config import SolveConfig
from equilibria.models.deq_transformer import DEQTransformer, DEQTransformerConfig, Memory

ModelFactory = Callable[..., DEQTransformer]
NORMS = pytest.mark.parametrize("norm", ["post", "pre"])


def _logits(model: DEQTransformer, tokens: Tensor, memory: Memory | None = None) -> Tensor:
    """Logits in eval mode, of solves that must have succeeded."""
    model.eval()
    with torch.no_grad():
        output = model(tokens, memory)
    assert output.solution.converged.all()
    return output.logits


def _by_segments(
    model: DEQTransformer, tokens: Tensor, lengths: list[int], memory_length: int
) -> Tensor:
    model.eval()
    memory, logits = None, []
    with torch.no_grad():
        for segment in tokens.split(lengths, dim=1):
            output = model(segment, memory, memory_length=memory_length)
            assert output.solution.converged.all()
            memory = output.memory
            logits.append(output.logits)
    return torch.cat(logits, dim=1)


@NORMS
def test_no_logit_depends_on_a_later_token(
    make_model: ModelFactory, tokens: Tensor, norm: str
) -> None:
    model = make_model(norm=norm)
    reference = _logits(model, tokens)
    for t in range(tokens.shape[1]):
        other = tokens.clone()
        other[:, t] = (other[:, t] + 3) % 11
        change = (_logits(model, other) - reference).abs()
        assert change[:, :t].sum() <= 1e-9
        assert change[:, t:].amax(dim=(0, 2)).min() > 1e-6  # and the future does notice


@NORMS
def test_causality_holds_with_a_memory(make_model: ModelFactory, tokens: Tensor, norm: str) -> None:
    model = make_model(norm=norm).eval()
    with torch.no_grad():
        memory = model(tokens, memory_length=5).memory
    reference = _logits(model, tokens, memory)
    other = tokens.clone()
    other[:, 4] = (other[:, 4] + 3) % 11
    torch.testing.assert_close(
        _logits(model, other, memory)[:, :4], reference[:, :4], rtol=0, atol=1e-10
    )


@NORMS
def test_the_map_is_bounded(make_model: ModelFactory, tokens: Tensor, norm: str) -> None:
    """Then a fixed point exists (Brouwer), and no solver can run away along a direction."""
    model = make_model(norm=norm)
    injection = model.cell.inject(model.embedding(tokens))
    z = torch.randn(2, 9, 8, dtype=torch.float64)
    near, far = model.cell(z, injection), model.cell(1e8 * z, injection)
    assert far.abs().max() < 10 * near.abs().max()
    # f(z + c) = f(z) + c for constants c, which layer norm does not see, would have no equilibrium
    assert (model.cell(z + 1.0, injection) - near - 1.0).abs().min(dim=2).values.max() > 0.1


def test_plain_iteration_is_causal_at_every_depth(make_model: ModelFactory, tokens: Tensor) -> None:
    """Not only at the fixed point: the unrolled network of pre-training is causal, bit for bit."""
    model = make_model().eval()
    other = tokens.clone()
    other[:, 5] = (other[:, 5] + 3) % 11
    for depth in (1, 2, 5):
        settings = SolveSettings(
            solver=Picard(), termination=FixedSteps(depth), max_steps=depth, on_failure="ignore"
        )
        a = model(tokens, settings=settings).logits
        b = model(other, settings=settings).logits
        assert torch.equal(a[:, :5], b[:, :5])


@NORMS
@pytest.mark.parametrize("lengths", [[5, 4], [2, 3, 4], [1] * 9])
def test_segments_with_memory_equal_the_whole_text(
    make_model: ModelFactory, tokens: Tensor, norm: str, lengths: list[int]
) -> None:
    model = make_model(norm=norm)
    whole = _logits(model, tokens)
    parts = _by_segments(model, tokens, lengths, memory_length=9)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)


def test_a_memory_too_short_is_noticed(make_model: ModelFactory, tokens: Tensor) -> None:
    """The equality above would be worthless if the model did not look at its memory."""
    model = make_model()
    whole = _logits(model, tokens)
    parts = _by_segments(model, tokens, [5, 4], memory_length=2)
    torch.testing.assert_close(parts[:, :5], whole[:, :5], rtol=0, atol=1e-10)
    assert (parts - whole)[:, 5:].abs().max() > 1e-3


def test_memory_keeps_the_latest_positions(make_model: ModelFactory, tokens: Tensor) -> None:
    model = make_model().eval()
    with torch.no_grad():
        long = model(tokens, memory_length=100).memory
        short = model(tokens, memory_length=4).memory
        assert (long.length, short.length) == (9, 4)
        for a, b in zip(long, short, strict=True):
            assert torch.equal(a[:, -4:], b)
        grown = model(tokens, long, memory_length=100).memory
        assert grown.length == 18
        assert torch.equal(grown.z[:, :9], long.z)


def test_memory_of_zero_positions_is_no_memory(make_model: ModelFactory, tokens: Tensor) -> None:
    model = make_model()
    parts = _by_segments(model, tokens, [5, 4], memory_length=0)
    alone = torch.cat([_logits(model, tokens[:, :5]), _logits(model, tokens[:, 5:])], dim=1)
    torch.testing.assert_close(parts, alone, rtol=0, atol=1e-12)


def test_memory_carries_no_graph(make_model: ModelFactory, tokens: Tensor) -> None:
    memory = make_model().train()(tokens, memory_length=9).memory
    assert not any(tensor.requires_grad for tensor in memory)


def test_memory_survives_as_tensors(make_model: ModelFactory, tokens: Tensor) -> None:
    model = make_model()
    memory = model(tokens, memory_length=5).memory
    rebuilt = model.memory_from([t.clone() for t in memory])
    assert torch.equal(_logits(model, tokens, rebuilt), _logits(model, tokens, memory))


@pytest.mark.parametrize(
    "shapes", [[(2, 5, 8)], [(2, 5, 8), (2, 5, 8)], [(2, 5, 16), (2, 5, 8)], [(2, 8), (2, 16)], []]
)
def test_memory_of_another_model_is_refused(
    make_model: ModelFactory, shapes: list[tuple[int, ...]]
) -> None:
    with pytest.raises(UserError, match="another model"):
        make_model().memory_from([torch.zeros(shape) for shape in shapes])


def test_a_sample_does_not_depend_on_its_batch(make_model: ModelFactory, tokens: Tensor) -> None:
    model = make_model()
    together = _logits(model, tokens)
    alone = torch.cat([_logits(model, row.unsqueeze(0)) for row in tokens])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


def test_same_call_same_bits(make_model: ModelFactory, tokens: Tensor) -> None:
    model = make_model()
    assert torch.equal(_logits(model, tokens), _logits(model, tokens))


def test_evaluation_draws_no_random_numbers(make_model: ModelFactory, tokens: Tensor) -> None:
    model = make_model(dropout=0.5, embedding_dropout=0.5)
    before = torch.get_rng_state()
    _logits(model, tokens)
    assert torch.equal(torch.get_rng_state(), before)


def test_copies_are_equal_and_independent(make_model: ModelFactory, tokens: Tensor) -> None:
    """Also after a training step: averaged weights are copies of a model in use."""
    model = make_model()
    model(tokens, memory_length=4).logits.sum().backward()
    twin = copy.deepcopy(model)
    before = _logits(model, tokens)
    assert torch.equal(_logits(twin, tokens), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    assert torch.equal(_logits(model, tokens), before)
    assert not torch.equal(_logits(twin, tokens), before)


def test_weights_survive_a_state_dict(make_model: ModelFactory, tokens: Tensor) -> None:
    model, other = make_model(seed=0), make_model(seed=1)
    assert not torch.equal(_logits(other, tokens), _logits(model, tokens))
    other.load_state_dict(model.state_dict())
    assert torch.equal(_logits(other, tokens), _logits(model, tokens))


@pytest.mark.parametrize("weight_norm", [True, False])
def test_number_of_parameters(make_model: ModelFactory, weight_norm: bool) -> None:
    d, inner, vocabulary = 8, 20, 11
    matrices = 3 * d * d + 3 * d * d + d * d + d * d + d * inner + inner * d
    biases = inner + d + 2 * d  # feed-forward, two of attention
    lengths = 3 * d + d + inner + d if weight_norm else 0  # one per row of a normed matrix
    model = make_model(weight_norm=weight_norm)
    expected = matrices + biases + lengths
    assert model.num_parameters(embedding=False) == expected
    assert model.num_parameters() == expected + vocabulary * (d + 1)


def test_weight_norm_is_computed_once_per_solve(make_model: ModelFactory, tokens: Tensor) -> None:
    model = make_model()
    calls: list[str] = []
    for name in ("qkv", "output", "expand", "contract"):
        norm = getattr(model.cell, name).parametrizations.weight[0]
        norm.register_forward_hook(lambda *_, name=name: calls.append(name))
    output = model(tokens, memory_length=9)
    output.logits.sum().backward()
    assert output.solution.num_evals > 10
    assert output.solution.backward.result is not None
    assert sorted(calls) == ["contract", "expand", "output", "qkv"]


def test_masks_are_drawn_once_per_solve(make_model: ModelFactory, tokens: Tensor) -> None:
    model = make_model(dropout=0.4, attention_dropout=0.2)
    seen: list[Any] = []
    model.cell.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1].masks))
    per_solve = []
    for _ in range(2):
        seen.clear()
        output = model(tokens)
        output.logits.sum().backward()
        assert output.solution.converged.all()  # a mask redrawn per evaluation has no fixed point
        assert len(seen) == output.solution.num_evals
        for masks in seen:
            for mask, first in zip(masks, seen[0], strict=True):
                # the very same, or the rows of those that have not converged
                same = (mask.unsqueeze(1) == first.unsqueeze(0)).flatten(2).all(2)
                assert mask is first or (len(mask) < len(first) and same.any(1).all())
        per_solve.append(seen[0])
    for first, second in zip(*per_solve, strict=True):
        assert not torch.equal(first, second)
    seen.clear()
    _logits(model, tokens)
    assert set(seen) == {(None, None, None, None)}


def test_training_and_evaluation_solve_with_their_own_settings(
    make_model: ModelFactory, tokens: Tensor
) -> None:
    solve = SolveConfig(
        solver=Anderson(),
        rtol=1e-2,
        max_steps=7,
        eval_solver=Broyden(),
        eval_rtol=1e-9,
        eval_max_steps=90,
    )
    model = make_model(solve=solve)
    training, evaluation = model.deq.train_settings, model.deq.eval_settings
    assert (training.solver, training.max_steps) == (Anderson(), 7)
    assert training.termination == Residual(1e-2)
    assert (evaluation.solver, evaluation.max_steps) == (Broyden(), 90)
    assert evaluation.termination == Residual(1e-9)
    assert evaluation.adjoint == training.adjoint
    assert int(model.train()(tokens).solution.num_steps.max()) <= 7
    assert int(model.eval()(tokens).solution.num_steps.max()) > 7


def test_trace_has_a_line_per_step(make_model: ModelFactory, tokens: Tensor) -> None:
    output = make_model()(tokens, trace=True)
    output.logits.sum().backward()
    trace = output.solution.trace
    assert trace is not None
    assert trace.shape == (int(output.solution.num_steps.max()) + 1, 2)
    assert trace[0].min() > 1e-2
    assert output.solution.backward.result is not None
    assert output.solution.backward.result.trace is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_work(
    make_model: ModelFactory, tokens: Tensor, dtype: torch.dtype
) -> None:
    model = make_model(solve=SolveConfig(rtol=1e-2, max_steps=20)).to(dtype)
    output = model(tokens, memory_length=4)
    output = model(tokens, output.memory, memory_length=4)
    output.logits.float().sum().backward()
    assert output.logits.dtype == output.memory.z.dtype == dtype
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"d_model": 12, "num_heads": 5},
            "num_heads=5 does not divide d_model=12; .* such as 4, or",
        ),
        ({"d_model": 0}, "d_model=0 must be an integer of at least 1"),
        ({"num_heads": 0}, "num_heads=0 must be"),
        ({"d_inner": -3}, "d_inner=-3 must be"),
        ({"d_model": 8.0}, "d_model=8.0 must be"),
        ({"norm": "batch"}, "norm='batch' is neither 'post' nor 'pre'"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"embedding_dropout": -0.1}, "embedding_dropout=-0.1 must be"),
        ({"init_std": 0.0}, "init_std=0.0 must be above 0"),
        ({"init_std": float("nan")}, "init_std=nan must be above 0"),
    ],
)
def test_options_that_make_no_model_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DEQTransformerConfig(**options)


def test_a_vocabulary_needs_a_symbol() -> None:
    with pytest.raises(UserError, match="vocabulary_size=0"):
        DEQTransformerConfig().build(0)
