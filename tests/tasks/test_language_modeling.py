"""Language modelling: memory across segments, honest scores, and nothing disturbed by a look."""

from __future__ import annotations

import gc
import io
import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria import Anderson, Picard, UserError
from equilibria.data.segments import Segment, TrainingSegments, evaluation_segments
from equilibria.models.config import SolveConfig
from equilibria.models.deq_transformer import DEQTransformer
from equilibria.tasks.language_modeling import LanguageModeling, LanguageModelingConfig

ModelFactory = Callable[..., DEQTransformer]
TEXT = torch.randint(11, (61,), generator=torch.Generator().manual_seed(2))
LOOSE = SolveConfig(solver=Anderson(), rtol=1e-3, max_steps=8)


def _task(model: nn.Module, **options: Any) -> LanguageModeling:
    config = LanguageModelingConfig(
        **{
            "batch_size": 2,
            "segment_length": 6,
            "memory_length": 5,
            "eval_streams": 3,
            **options,
        }
    )

    def evaluation(split: str) -> Iterable[Segment]:
        tokens = TEXT if split == "valid" else TEXT.flip(0)
        return evaluation_segments(tokens, config.eval_streams, config.segment_length)

    training = TrainingSegments(TEXT, config.batch_size, config.segment_length)
    return LanguageModeling(model, config, training, evaluation)  # pyright: ignore[reportArgumentType]


def _record_calls(model: nn.Module) -> list[dict[str, Any]]:
    """What the model is called with and what it returns, from now on."""
    calls: list[dict[str, Any]] = []

    def hook(_: nn.Module, arguments: Any, options: dict[str, Any], output: Any) -> None:
        calls.append(
            {"tokens": arguments[0], "memory": arguments[1], "options": options, "output": output}
        )

    model.register_forward_hook(hook, with_kwargs=True)
    return calls


def _train(task: LanguageModeling, first: int, last: int) -> list[Tensor]:
    """Losses and all gradients of training steps first, ..., last - 1."""
    results: list[Tensor] = []
    for step in range(first, last):
        task.model.zero_grad()
        loss = task.training_loss(step).loss
        loss.backward()
        gradients = [parameter.grad for parameter in task.model.parameters()]
        results += [loss.detach(), *(g.clone() for g in gradients if g is not None)]
    return results


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_memory_flows_from_segment_to_segment_and_ends_with_the_text(
    make_model: ModelFactory,
) -> None:
    model = make_model(solve=LOOSE)
    calls = _record_calls(model)
    task = _task(model)
    per_epoch = 30 // 6
    for step in range(2 * per_epoch + 1):
        task.training_loss(step)
    for i, call in enumerate(calls):
        assert call["options"]["memory_length"] == 5
        if i % per_epoch == 0:
            assert call["memory"] is None
        else:
            assert _same(list(call["memory"]), list(calls[i - 1]["output"].memory))
            assert call["memory"].length == 5


def test_without_memory_every_segment_stands_alone(make_model: ModelFactory) -> None:
    model = make_model(solve=LOOSE)
    calls = _record_calls(model)
    task = _task(model, memory_length=0)
    _train(task, 0, 4)
    assert [call["memory"] for call in calls] == [None] * 4
    assert task.state_dict()["memory"] is None


def test_training_loss_is_the_mean_cross_entropy_of_the_segment(make_model: ModelFactory) -> None:
    model = make_model()
    result = _task(model).training_loss(0)
    rows = TEXT[:60].reshape(2, 30)[:, :6], TEXT[1:61].reshape(2, 30)[:, :6]
    logits = model(rows[0]).logits
    expected = -logits.log_softmax(-1).gather(-1, rows[1].unsqueeze(-1)).mean()
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert result.num_items == 12


def test_gradients_do_not_cross_segments(make_model: ModelFactory) -> None:
    """Two steps in one graph: the second loss gives the first segment's input nothing."""
    model = make_model(solve=LOOSE)
    embedded: list[Tensor] = []

    def keep(_module: nn.Module, _arguments: Any, output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    model.embedding.register_forward_hook(keep)
    task = _task(model)
    task.training_loss(0)
    task.training_loss(1).loss.backward()
    assert embedded[0].grad is None
    assert embedded[1].grad is not None


def test_first_steps_are_an_unrolled_network(make_model: ModelFactory) -> None:
    task = _task(make_model(solve=LOOSE), pretrain_steps=2, pretrain_layers=3)
    results = [task.training_loss(step) for step in range(4)]
    assert [r.phase for r in results] == ["unrolled"] * 2 + ["equilibrium"] * 2
    assert {int(n) for r in results[:2] for n in r.solution.num_steps} == {3}
    assert min(int(n) for r in results[2:] for n in r.solution.num_steps) > 3


@pytest.mark.parametrize("streams", [1, 2, 3, 7, 60, 100])
@pytest.mark.parametrize("memory_length", [0, 5])
def test_every_token_is_scored_once(
    make_model: ModelFactory, streams: int, memory_length: int
) -> None:
    model = make_model(solve=LOOSE)
    task = _task(model, eval_streams=streams, memory_length=memory_length)
    result = task.evaluate("valid")
    assert result.num_items == 60
    total, count, memory = 0.0, 0, None
    model.eval()
    for segment in evaluation_segments(TEXT, streams, 6):
        with torch.no_grad():
            output = model(
                segment.inputs, None if segment.starts else memory, memory_length=memory_length
            )
        memory = output.memory
        log_probabilities = output.logits.float().log_softmax(-1)
        for row in range(segment.targets.shape[0]):
            for column in range(segment.targets.shape[1]):
                target = int(segment.targets[row, column])
                if target >= 0:
                    total -= log_probabilities[row, column, target].item()
                    count += 1
    assert count == 60
    assert result.loss == pytest.approx(total / 60, rel=1e-6)


def test_one_stream_with_long_memory_scores_the_text_as_a_whole(make_model: ModelFactory) -> None:
    """Segments are a way of computing, not a part of the score."""
    model = make_model()
    result = _task(model, eval_streams=1, eval_memory_length=60).evaluate("valid")
    with torch.no_grad():
        logits = model.eval()(TEXT[:-1].unsqueeze(0)).logits[0]
    assert result.loss == pytest.approx(F.cross_entropy(logits, TEXT[1:]).item(), rel=1e-6)
    assert result.relative_residual.max() < 1e-12


def test_memory_ends_where_another_text_starts(make_model: ModelFactory) -> None:
    """A split of several texts: none of them reads on in the memory of another."""
    model = make_model(solve=LOOSE)
    task = _task(model, eval_streams=1)
    alone = [task.evaluate("valid"), task.evaluate("test")]

    def both(_: str) -> Iterable[Segment]:
        yield from evaluation_segments(TEXT, 1, 6)
        yield from evaluation_segments(TEXT.flip(0), 1, 6)

    together = LanguageModeling(
        model,  # pyright: ignore[reportArgumentType]
        task.config,
        TrainingSegments(TEXT, 2, 6),
        both,
    ).evaluate("valid")
    assert together.num_items == 120
    assert together.loss == pytest.approx(sum(result.loss for result in alone) / 2, rel=1e-9)


def test_evaluation_reports_what_each_sample_needed(make_model: ModelFactory) -> None:
    result = _task(make_model(solve=LOOSE), eval_streams=4).evaluate("test")
    num_solves = math.ceil(60 / 4 / 6)
    assert result.num_evals.shape == result.relative_residual.shape == (num_solves * 4,)
    assert 2 <= int(result.num_evals.min()) <= int(result.num_evals.max()) <= 9
    assert result.seconds > 0


def test_splits_are_different_texts(make_model: ModelFactory) -> None:
    task = _task(make_model(solve=LOOSE))
    assert task.evaluate("valid").loss != task.evaluate("test").loss
    assert task.evaluate("valid").loss == task.evaluate("valid").loss


def test_memory_in_evaluation_is_its_own(make_model: ModelFactory) -> None:
    model = make_model(solve=LOOSE)
    calls = _record_calls(model)
    _task(model, memory_length=2, eval_memory_length=9).evaluate("valid")
    assert [c["memory"].length for c in calls if c["memory"] is not None] == [6, 9, 9]
    calls.clear()
    _task(model, memory_length=2, eval_memory_length=0).evaluate("valid")
    assert all(call["memory"] is None for call in calls)


@pytest.mark.parametrize("look", ["evaluate", "trace"])
def test_a_look_at_the_model_does_not_change_training(make_model: ModelFactory, look: str) -> None:
    """Neither the place in the text, the memory, the random numbers, nor any gradient."""
    options = {"solve": LOOSE, "dropout": 0.3, "embedding_dropout": 0.2}

    def run(looks: bool) -> list[Tensor]:
        task = _task(make_model(**options))
        torch.manual_seed(9)
        results = []
        for step in range(4):
            results += _train(task, step, step + 1)
            if looks:
                gradients = [p.grad for p in task.model.parameters()]
                task.evaluate("valid") if look == "evaluate" else task.trace()
                assert task.model.training
                assert all(
                    p.grad is g for p, g in zip(task.model.parameters(), gradients, strict=True)
                )
        return results

    assert _same(run(looks=True), run(looks=False))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_as_it_was(make_model: ModelFactory, training: bool) -> None:
    task = _task(make_model(solve=LOOSE))
    task.model.train(training)
    task.evaluate("valid")
    task.trace()
    assert task.model.training is training


def test_the_mode_comes_back_after_a_failure(make_model: ModelFactory) -> None:
    task = _task(make_model(solve=LOOSE))
    task.model.train()

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = task.model.register_forward_pre_hook(fail)
    for look in (lambda: task.evaluate("valid"), task.trace):
        with pytest.raises(KeyboardInterrupt):
            look()
        assert task.model.training
    handle.remove()


def test_trace_has_both_solves(make_model: ModelFactory) -> None:
    solution = _task(make_model(solve=LOOSE)).trace()
    assert solution.trace is not None
    assert solution.trace.shape[1] == 3  # the streams of evaluation
    assert solution.backward.result is not None
    assert solution.backward.result.trace is not None


@pytest.mark.parametrize("place", [0, 3, 5, 7])
def test_training_goes_on_bit_for_bit_from_a_saved_state(
    make_model: ModelFactory, place: int
) -> None:
    """Within an epoch, at its border, and in the second one."""
    straight = _task(make_model(solve=LOOSE))
    _train(straight, 0, place)
    stored = io.BytesIO()
    torch.save(straight.state_dict(), stored)
    stored.seek(0)
    resumed = _task(make_model(solve=LOOSE))
    _train(resumed, 0, 2)  # it stood somewhere else
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    assert _same(_train(resumed, place, place + 7), _train(straight, place, place + 7))


def test_state_of_another_model_or_text_is_refused(make_model: ModelFactory) -> None:
    task = _task(make_model(solve=LOOSE))
    _train(task, 0, 1)
    state = task.state_dict()
    with pytest.raises(UserError, match="another model"):
        _task(make_model(d_model=4, solve=LOOSE)).load_state_dict(state)
    with pytest.raises(UserError, match="length = 6 and this run has 4"):
        _task(make_model(solve=LOOSE), segment_length=4).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be an integer of at least 1"),
        ({"segment_length": -1}, "segment_length=-1 must be"),
        ({"segment_length": 2.5}, "segment_length=2.5 must be"),
        ({"pretrain_layers": 0}, "pretrain_layers=0 must be"),
        ({"pretrain_steps": -1}, "pretrain_steps=-1 must be at least 0"),
        ({"eval_streams": 0}, "eval_streams=0 must be"),
        ({"memory_length": -1}, "a memory of -1 positions is impossible; give 0 for no memory"),
        ({"eval_memory_length": -4}, "a memory of -4 positions is impossible"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LanguageModelingConfig(**options)


def test_memory_in_evaluation_is_that_of_training_unless_given() -> None:
    assert LanguageModelingConfig(memory_length=7).memory_length_in_evaluation == 7
    assert (
        LanguageModelingConfig(memory_length=7, eval_memory_length=0).memory_length_in_evaluation
        == 0
    )


def test_evaluation_keeps_no_solve_alive(make_model: ModelFactory) -> None:
    """A solution holds on to its problem: injection, masks, state."""
    task = _task(make_model(solve=LOOSE))
    alive: list[weakref.ref[Any]] = []
    most = 0

    def hook(_: nn.Module, arguments: Any, output: Any) -> None:
        nonlocal most
        alive.append(weakref.ref(output.solution))
        gc.collect()
        most = max(most, sum(solution() is not None for solution in alive))

    task.model.register_forward_hook(hook)
    task.evaluate("valid")
    assert len(alive) > 3
    assert most <= 2


@pytest.mark.parametrize("num_chunks", [2, 3])
def test_chunks_add_up_to_the_batch(make_model: ModelFactory, num_chunks: int) -> None:
    """Losses, gradients and memory of two steps, in equal and unequal parts."""

    def trained(chunks: int) -> tuple[list[Tensor], dict[str, Any]]:
        model = make_model(solve=SolveConfig(solver=Picard(), rtol=1e-12, max_steps=12))
        task = _task(model.double(), batch_size=3)
        found: list[Tensor] = []
        for step in range(2):
            model.zero_grad()
            parts = []
            for part in task.training_losses(step, chunks):
                part.minimised.backward()
                parts.append(part.weight * part.loss.detach())
            found += [torch.stack(parts).sum(), *(p.grad.clone() for p in model.parameters())]
        return found, task.state_dict()

    whole, cut = trained(1), trained(num_chunks)
    for one, other in zip(whole[0], cut[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    for one, other in zip(whole[1]["memory"], cut[1]["memory"], strict=True):
        torch.testing.assert_close(one, other)


def test_recovering_forgets_the_memory(make_model: ModelFactory) -> None:
    task = _task(make_model(solve=LOOSE))
    task.training_loss(0)
    assert task.state_dict()["memory"] is not None
    task.recover()
    assert task.state_dict()["memory"] is None
    task.training_loss(1)
