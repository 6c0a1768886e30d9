"""Copy memory: the published loss, honest figures, and a place that can be saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria import Anderson, UserError
from equilibria.data.copy_memory import CopySequencesConfig
from equilibria.models.config import SolveConfig
from equilibria.models.deq_transformer import DEQTransformer, DEQTransformerConfig
from equilibria.models.recurrent import RecurrentConfig
from equilibria.tasks.copy_memory import CopyMemory, CopyMemoryConfig

SOURCE = CopySequencesConfig(num_blanks=7, num_symbols=3, num_valid=6, num_test=10).load()


class _Output(NamedTuple):
    logits: Tensor
    solution: None = None


class _Knows(nn.Module):
    """Says the right symbols with a margin, but for those it is told to get wrong."""

    def __init__(self, margin: float, wrong: int = 0) -> None:
        super().__init__()
        self.margin = nn.Parameter(torch.tensor(margin))
        self.wrong = wrong

    def forward(self, tokens: Tensor, *, settings: Any = None, trace: bool = False) -> _Output:
        said = torch.zeros_like(tokens)
        said[:, -3:] = tokens[:, :3]
        said[: self.wrong, -1] = 0  # the last symbol of the first sequences of each batch
        return _Output(self.margin * F.one_hot(said, 10).float())


class _Forgets(_Knows):
    """Knows where symbols go and none of them."""

    def forward(self, tokens: Tensor, *, settings: Any = None, trace: bool = False) -> _Output:
        logits = torch.full((*tokens.shape, 10), -50.0)
        logits[:, :-3, 0] = 50.0
        logits[:, -3:, 1:9] = 50.0
        return _Output(logits + 0.0 * self.margin)


def _task(model: nn.Module, **options: Any) -> CopyMemory:
    return CopyMemory(model, CopyMemoryConfig(batch_size=4, **options), SOURCE)  # pyright: ignore[reportArgumentType]


def _deq(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return DEQTransformerConfig(
        d_model=8,
        num_heads=2,
        d_inner=12,
        dropout=dropout,
        embedding_dropout=dropout,
        init_std=0.2,
        solve=SolveConfig(solver=Anderson(), rtol=1e-3, max_steps=8),
    ).build(10)


def test_the_baseline_is_the_loss_without_memory() -> None:
    task = _task(_Forgets(1.0))
    assert task.baselines["memoryless"] == pytest.approx(3 * math.log(8) / 13)
    assert task.evaluate("test").loss == pytest.approx(task.baselines["memoryless"])
    published = CopyMemory(_Forgets(1.0), CopyMemoryConfig(), CopySequencesConfig().load())  # pyright: ignore[reportArgumentType]
    assert published.baselines["memoryless"] == pytest.approx(0.0495, abs=5e-5)


@pytest.mark.parametrize("margin", [2.0, 15.0, 30.0])
def test_the_loss_is_the_mean_over_all_positions(margin: float) -> None:
    """To more digits than float32 has near zero."""
    exact = math.log1p(9 * math.exp(-margin))
    result = _task(_Knows(margin)).evaluate("valid")
    assert result.loss == pytest.approx(exact, rel=1e-9)
    assert result.num_items == 6 * 13
    assert result.figures == {"recall": 1.0, "exact_recall": 1.0}


def test_symbols_and_sequences_are_counted_apart() -> None:
    figures = _task(_Knows(5.0, wrong=1), eval_batch_size=5).evaluate("test").figures
    assert figures["recall"] == pytest.approx(1 - 2 / 30)  # one wrong symbol in each of 2 batches
    assert figures["exact_recall"] == pytest.approx(0.8)


def test_a_training_step_takes_the_next_batch() -> None:
    task = _task(_Knows(2.0))
    step = task.training_loss(0)
    assert step.num_items == 4 * 13
    assert step.phase == "explicit"
    assert step.solution is None
    assert step.figures["recall"] == 1.0
    assert step.loss.requires_grad
    assert task.state_dict() == {"num_served": 1}


def test_the_place_in_the_data_can_be_restored() -> None:
    first, second = _task(_deq()), _task(_deq())
    for step in range(3):
        first.training_loss(step)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.training_loss(3).loss, second.training_loss(3).loss)
    fresh = _task(_deq()).training_loss(3).loss
    assert not torch.equal(fresh, second.training_loss(3).loss)


def test_phases_of_an_equilibrium_model() -> None:
    task = _task(_deq(), pretrain_steps=1, pretrain_layers=3)
    unrolled, equilibrium = task.training_loss(0), task.training_loss(1)
    assert (unrolled.phase, equilibrium.phase) == ("unrolled", "equilibrium")
    assert unrolled.solution is not None
    assert unrolled.solution.num_steps.tolist() == [3] * 4
    equilibrium.loss.backward()
    assert all(p.grad is not None for p in task.model.parameters())


def test_evaluation_counts_solves_and_disturbs_nothing() -> None:
    task = _task(_deq(dropout=0.3))
    task.model.train()
    first, state = task.evaluate("test"), task.state_dict()
    again = task.evaluate("test")
    assert first.loss == again.loss
    assert first.num_evals.shape == first.relative_residual.shape == (10,)
    assert task.model.training
    assert task.state_dict() == state == {"num_served": 0}
    assert all(p.grad is None for p in task.model.parameters())


def test_the_score_does_not_depend_on_the_batch_size(
    make_model: Callable[..., DEQTransformer],
) -> None:
    losses = [
        _task(make_model(), eval_batch_size=size).evaluate("test").loss for size in (1, 3, 10)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-9)


def test_an_explicit_model_has_no_solves_to_count_or_trace() -> None:
    torch.manual_seed(0)
    task = _task(RecurrentConfig(unit="gru", d_embedding=4, d_hidden=5).build(10))
    assert task.evaluate("valid").num_evals.numel() == 0
    assert task.trace() is None


def test_a_trace_shows_both_solves_and_leaves_no_gradients() -> None:
    task = _task(_deq())
    task.model.train()
    solution = task.trace()
    assert solution is not None
    assert solution.trace is not None
    assert solution.backward.result is not None
    assert all(p.grad is None for p in task.model.parameters())
    assert task.model.training


def test_the_progress_line_shows_recall() -> None:
    assert _task(_Knows(1.0)).shown({"recall": 0.256}) == {"recall": "25.6%"}


@pytest.mark.parametrize("name", ["batch_size", "pretrain_layers", "eval_batch_size"])
def test_counts_are_checked(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}=0 must be an integer of at least 1"):
        CopyMemoryConfig(**{name: 0})


def test_pretraining_cannot_be_negative() -> None:
    with pytest.raises(UserError, match="pretrain_steps=-1 must be at least 0"):
        CopyMemoryConfig(pretrain_steps=-1)
