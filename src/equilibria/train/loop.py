"""The training loop: steps, metrics, checkpoints, and coming back after a stop."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from equilibria.core.errors import UserError, is_out_of_memory
from equilibria.tasks.task import Evaluation, Task
from equilibria.train.checkpoint import Snapshot
from equilibria.train.checkpoint_writer import CheckpointWriter
from equilibria.train.engine import Engine
from equilibria.train.experiment import Data, Experiment
from equilibria.train.fit import check_shapes
from equilibria.train.interrupt import StopRequest
from equilibria.train.launch import is_launched
from equilibria.train.metrics_log import MetricsLog
from equilibria.train.optimizers import Plateau
from equilibria.train.progress import Progress
from equilibria.train.run_folder import RunFolder
from equilibria.train.saved_state import (
    check_interval,
    check_statistics,
    fitting_optimizer_state,
    restored,
    restored_plateau,
)
from equilibria.train.shards import (
    cut_optimizer_state,
    held_here,
    load_weights,
    split_optimizer_state,
    whole,
)
from equilibria.train.statistics import Clock, Interval, SolveStatistics, StepRecord
from equilibria.train.tensor_files import Part, TensorFiles
from equilibria.train.trackers import Trackers


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is intact."""


class MemoryRanOutError(TrainingError):
    """That, in this process; others do not know of it."""


class Trainer:
    """Trains one task in one run folder, alone or as one of several processes.

    Args:
        experiment: the resolved configuration.
        task: model and data, as made by `experiment.build_task`.
        run: where the main process writes everything.
        engine: the processes that train together; None for this one.
    """

    def __init__(
        self, experiment: Experiment, task: Task, run: RunFolder, engine: Engine | None = None
    ) -> None:
        self.experiment = experiment
        self.task = task
        self.run = run
        self.engine = engine or Engine(experiment.train.torch_device())
        task.share = self.engine.share
        task.distributed = self.engine.distribute(task.model)
        self.engine.seed(experiment.seed)
        self.optimizer = experiment.optimizer.build(task.model.parameters())
        self.step = 0
        self.clock = Clock()
        self.statistics = SolveStatistics()
        self.plateau = Plateau()
        self._interval = Interval()
        self._phase = "equilibrium"
        self._rate = 0.0
        self._valid_loss: float | None = None
        self._num_skipped = 0
        """Steps in a row that were not finite; whoever resumes grants as many again."""
        self._saved_step = 0
        self.trackers = Trackers()
        """Where the main process sends its records, too; started and ended by whoever sets them."""
        self._progress: Progress | None = None
        self._log: MetricsLog | None = None
        self._writer = CheckpointWriter(run.checkpoints, experiment.train)

    def resume(self) -> None:
        """Go back to the newest checkpoint of the run, bit for bit.

        Other numbers of processes than then get their shares of the same memory, and new random
        numbers.

        Raises:
            UserError: there is none, or it is damaged or belongs to another run.
        """
        checkpoints = self.run.checkpoints
        self.run.check_places()
        checkpoints.best_loss()  # what is damaged there is said now, and not after hours
        step = checkpoints.latest()
        state = checkpoints.load_training(step)
        if not state:
            raise UserError(
                f"{self.run.path} was made by 'equilibria convert' and has no training state to "
                "resume from; it can be scored, generate and be shared"
            )
        weights = checkpoints.weights(step, resuming=True)
        check_shapes(weights, self.task.model.state_dict())
        try:
            untouched = self._untouched(state, weights)
            load_weights(self.task.model, weights)
            self._restore(state, step, untouched)
        except UserError:
            raise
        except Exception as error:
            # whatever optimisers and generators raise when they are given something foreign
            reason = str(error).partition("\n")[0][:200]
            raise UserError(
                f"the training state in {checkpoints.path(step)} does not fit this run "
                f"({type(error).__name__}: {reason}); delete that folder to resume from the "
                "checkpoint before it"
            ) from error
        self.step = step
        if self.engine.is_main:
            self.run.rewind_metrics(step)

    def stand_alone(self, data: Data) -> None:
        """Let this process judge the model without the others: the whole task, made anew.

        Its weights are random until they are loaded.
        """
        if self.engine.share.num_processes > 1:
            self.task = self.experiment.build_task(data)

    def fit(self) -> int:
        """Train to the end or until asked to stop; the exit code of a stop, 0 at the end.

        All processes return the same.

        Raises:
            TrainingError: loss or gradient is NaN or infinite for many steps in a row, memory is
                short, or the last checkpoint cannot be written.
        """
        total = self.experiment.train.num_steps
        with ExitStack() as stack:
            stop = stack.enter_context(StopRequest(patient=is_launched()))
            stack.enter_context(self._writer)
            if self.engine.is_main:
                self._progress = stack.enter_context(Progress(self.step, total, self.task.shown))
                self._log = stack.enter_context(MetricsLog(self.run, self.step))
            self._announce_pretraining()
            while self.step < total:
                with _memory_errors(f"step {self.step + 1}", self.run):
                    code = self._train_step(stop)
                if self._progress is not None:
                    self._progress.advance()
                if self.step == self.experiment.task.pretrain_steps < total:
                    self._say(f"step {self.step}: pre-training ends, equilibria begin")
                with _memory_errors(f"the evaluation or checkpoint of step {self.step}", self.run):
                    self._report()
                if code:
                    if self.step != self._saved_step:
                        self._save()
                    self._finish_writing()
                    return code
            self._finish_writing()
        return 0

    def _announce_pretraining(self) -> None:
        """That what is trained first, fast, is not what is validated."""
        last, total = self.experiment.task.pretrain_steps, self.experiment.train.num_steps
        if self.step >= last:
            return
        self._say(
            f"pre-training by a few unrolled layers until step {last:,}; validation solves for "
            "equilibria all the time, and says little before that"
        )
        if last >= total:
            self._say(
                f"all {total:,} steps are pre-training, and none is at equilibrium; lower "
                "--task.pretrain-steps, or train for longer"
            )

    def _train_step(self, stop: StopRequest) -> int:
        """One step; the exit code that any of the processes was asked to stop with."""
        start = time.perf_counter()
        config = self.experiment.optimizer
        rate = config.learning_rate_at(self.step, self.experiment.train.num_steps)
        rate *= self.plateau.factor
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        record = self._differentiate()
        norm = whole(
            torch.nn.utils.clip_grad_norm_(
                self.task.model.parameters(), config.clip_norm or math.inf
            )
        )
        finite = math.isfinite(record.loss.item()) and math.isfinite(norm.item())
        wishes = torch.tensor([float(not finite), float(stop.exit_code)], device=norm.device)
        poisoned, code = self.engine.largest(wishes).tolist()
        self.step += 1
        if poisoned:
            self._skip(record, norm, time.perf_counter() - start)
        else:
            self.optimizer.step()
            self._num_skipped = 0
            self._count(record, norm, time.perf_counter() - start)
        self._phase, self._rate = record.phase, rate
        return int(code)

    def _differentiate(self) -> StepRecord:
        """Leave the gradients of the next batch, chunk by chunk."""
        num_chunks = self.experiment.train.batch_chunks
        losses = self.task.training_losses(self.step, num_chunks)
        records: list[StepRecord] = []
        for chunk in range(num_chunks):
            with self.experiment.train.autocast():
                loss = next(losses)
            model = self.task.distributed or self.task.model
            with self.engine.without_sync(model, enabled=chunk + 1 < num_chunks):
                loss.minimised.backward()
            records.append(StepRecord.of(loss))
        return StepRecord.joined(records)

    def _count(self, record: StepRecord, norm: Tensor, seconds: float) -> None:
        self._interval.add(record, norm, seconds)
        self.clock.add(record.solves, seconds)
        if record.phase == "equilibrium":
            self.statistics.add(record.solves)

    def _skip(self, record: StepRecord, norm: Tensor, seconds: float) -> None:
        """Leave weights and optimiser as they are; stop when that does not help."""
        self.optimizer.zero_grad(set_to_none=True)
        self.task.recover()
        self._interval.skip(seconds)
        self.clock.add((), seconds)
        self._num_skipped += 1
        diagnosis = self._diagnosis(record, norm)
        if self._num_skipped >= self.experiment.train.max_nonfinite_steps:
            raise TrainingError(
                f"{diagnosis}, as were {self._num_skipped - 1} steps before it; begin again from "
                f"{self.run.config_file} with a lower --optimizer.learning-rate, a longer warm-up "
                f"or --task.pretrain-steps, or more solver steps{self._way_on()}"
            )
        self._say(f"{diagnosis}; the step is skipped")

    def _way_on(self) -> str:
        """What else can be done where there is a checkpoint."""
        steps = self.run.checkpoints.steps()
        return (
            f", or go on from step {steps[-1]} by --resume if the cause has gone" if steps else ""
        )

    def _diagnosis(self, record: StepRecord, norm: Tensor) -> str:
        what = "loss" if not math.isfinite(record.loss.item()) else "gradient"
        failed = sum(solve.num_failed for solve in record.solves)
        solve = ""
        if record.solves:
            residuals = torch.cat([solve.relative_residual for solve in record.solves])
            solve = (
                f"; forward solve: {failed} of {residuals.numel()} samples missed the tolerance, "
                f"worst relative residual {residuals.max().item():.2g}"
            )
        return (
            f"the {what} of step {self.step} is not finite (loss {record.loss.item():.4g}, "
            f"gradient norm {norm.item():.4g}{solve})"
        )

    def _report(self) -> None:
        config, last = self.experiment.train, self.step == self.experiment.train.num_steps
        if self.step % config.log_every == 0 or last:
            interval = Interval.gathered(self.engine.gather(self._interval.state_dict()))
            self._interval = Interval()
            record = {
                "kind": "train",
                "step": self.step,
                "phase": self._phase,
                "learning_rate": self._rate,
                **interval.record(),
            }
            self._write(record)
            if self._progress is not None:
                self._progress.metrics(record)
        improved = False
        if self.step % config.eval_every == 0 or last:
            improved = self._evaluate()
        if improved or last or self.step % config.checkpoint_every == 0:
            self._save()

    def _evaluate(self) -> bool:
        with self.experiment.train.autocast():
            result = self.task.evaluate("valid")
        result = Evaluation.gathered(self.engine.gather(result))
        self.plateau.see(result.loss, self.experiment.optimizer)
        record = {"kind": "valid", "step": self.step, "loss": result.loss, **result.figures}
        if result.num_evals.numel():
            record["num_evals"] = result.num_evals.double().mean().item()
            record["relative_residual"] = result.relative_residual.double().mean().item()
        self._write(record)
        if self._progress is not None:
            self._progress.validation(record)
        self._valid_loss = result.loss
        return self.engine.from_main(result.loss < self._writer.loss_to_beat)

    def _write(self, record: dict[str, Any]) -> None:
        """Metrics; a full disk costs records, and not the run."""
        if self._log is None:
            return
        try:
            self._log.write(record)
        except OSError as error:
            self._say(f"the metrics of step {self.step} could not be written ({error.strerror})")
        self.trackers.log(record)
        for complaint in self.trackers.told():
            self._say(complaint)

    def _say(self, line: str) -> None:
        if self._progress is not None:
            self._progress.say(line)

    def _save(self) -> None:
        """Let the main process write everything, or every process its shards."""
        if self.engine.is_sharded and self.engine.is_main:
            self._writer.begin(self.step)
        snapshot = self._snapshot()  # which no process leaves before all have entered it
        failure = None
        if self.engine.is_main or self.engine.is_sharded:
            failure = self._writer.save(self.step, snapshot, self._valid_loss)
        self._valid_loss, self._saved_step = None, self.step
        if failure is not None:
            self._say(f"{failure}; training goes on")

    def _snapshot(self) -> Snapshot:
        """What this process writes of a checkpoint."""
        weights, optimizer = self.task.model.state_dict(), self.optimizer.state_dict()
        if not self.engine.is_sharded:
            return Snapshot(weights, self._training_state(optimizer))
        shards, rest = split_optimizer_state(optimizer)
        training, first = self._training_state(rest), self.engine.is_main
        rank, num_processes = self.engine.share
        return Snapshot(
            held_here(weights, first=first),
            training if first else None,
            shards,
            Part(rank + 1, num_processes),
        )

    def _finish_writing(self) -> None:
        """Wait for the last checkpoint; all processes learn whether it is there.

        Raises:
            TrainingError: it could not be written.
        """
        failure = self.engine.from_main(self._writer.wait() if self.engine.is_main else None)
        if failure is not None:
            raise TrainingError(failure)

    def _untouched(self, state: dict[str, Any], weights: TensorFiles) -> set[int]:
        """Parameters by number of which the optimiser knows nothing and that no step has changed.

        Those that have no part in the loss, or all, where every step so far was skipped. The model
        is still as it was made.
        """
        known = state["optimizer"]["state"]
        return {
            number
            for number, (name, parameter) in enumerate(self.task.model.named_parameters())
            if not known.get(number)
            and torch.equal(whole(parameter.detach()).cpu(), weights.read(name))
        }

    def _restore(self, state: dict[str, Any], step: int, untouched: set[int]) -> None:
        device = next(self.task.model.parameters()).device
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        shards = self.run.checkpoints.optimizer_shards(step)
        saved = cut_optimizer_state(state["optimizer"], parameters, shards)
        config = self.experiment.optimizer
        self.optimizer.load_state_dict(
            fitting_optimizer_state(saved, self.optimizer, config, step, untouched)
        )
        self.task.load_state_dict(state["task"])
        self.clock = restored(Clock, state["clock"])
        check_statistics(state["statistics"], self.experiment.task.batch_size)
        self.statistics.load_state_dict(state["statistics"])
        check_interval(state["interval"])
        interval = Interval.from_state_dict(state["interval"], device)
        self._interval = interval if self.engine.is_main else interval.without_counts()
        self.plateau = restored_plateau(state["plateau"], config)
        _restore_random(state["random"], self.engine, self.experiment.seed, step)

    def _training_state(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        own = {"task": self.task.state_dict(), "random": _random_state()}
        states = self.engine.gather(own)
        interval = Interval.gathered(self.engine.gather(self._interval.state_dict()))
        return {
            "optimizer": optimizer,
            "task": self.task.gathered([state["task"] for state in states]),
            "clock": vars(self.clock),
            "statistics": self.statistics.state_dict(),
            "interval": interval.state_dict(),
            "plateau": vars(self.plateau),
            "random": [state["random"] for state in states],
        }


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _restore_random(states: list[dict[str, Any]], engine: Engine, seed: int, step: int) -> None:
    """Go on with the own random numbers; other ones where there were fewer processes."""
    rank, num_processes = engine.share
    if len(states) != num_processes and rank:
        engine.seed(seed, step)
        return
    torch.set_rng_state(states[rank]["cpu"])
    if torch.cuda.is_available() and states[rank]["cuda"]:
        torch.cuda.set_rng_state_all(states[rank]["cuda"])


@contextmanager
def _memory_errors(where: str, run: RunFolder) -> Generator[None]:
    """Name the settings that would help when memory runs out.

    Raises:
        MemoryRanOutError: it did.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryRanOutError(
            f"memory ran out in {where} ({str(error).splitlines()[0]}); raise "
            "--train.batch-chunks, which changes no result, or lower --task.batch-size, the "
            "segment length, the streams of evaluation, or the solver's history_size; "
            "--train.precision bfloat16 needs less, too. "
            f"Checkpoints in {run.checkpoints.folder} are untouched"
        ) from error
