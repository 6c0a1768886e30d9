"""The training loop: steps, metrics, checkpoints, and coming back after a stop."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from typing import Any

import torch

from equilibria.core.errors import UserError
from equilibria.core.solution import Solution
from equilibria.tasks.task import StepLoss, Task
from equilibria.train.experiment import Experiment
from equilibria.train.interrupt import StopRequest
from equilibria.train.metrics_log import MetricsLog
from equilibria.train.optimizers import Plateau
from equilibria.train.progress import Progress
from equilibria.train.run_folder import RunFolder
from equilibria.train.statistics import Clock, Interval, SolveStatistics


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint is intact."""


class Trainer:
    """Trains one task in one run folder.

    Args:
        experiment: the resolved configuration.
        task: model and data, as made by `experiment.build_task`.
        run: where everything is written.
    """

    def __init__(self, experiment: Experiment, task: Task, run: RunFolder) -> None:
        self.experiment = experiment
        self.task = task
        self.run = run
        self.optimizer = experiment.optimizer.build(task.model.parameters())
        self.step = 0
        self.clock = Clock()
        self.statistics = SolveStatistics()
        self.plateau = Plateau()
        self._interval = Interval()
        self._phase = "equilibrium"
        self._rate = 0.0
        self._valid_loss: float | None = None

    def resume(self) -> None:
        """Go back to the newest checkpoint of the run, bit for bit.

        Raises:
            UserError: there is none, or it is damaged or belongs to another run.
        """
        checkpoints = self.run.checkpoints
        step = checkpoints.latest()
        state = checkpoints.load_training(step)
        checkpoints.load_weights(step, self.task.model)
        try:
            self._restore(state)
        except UserError:
            raise
        except Exception as error:
            # whatever optimisers and generators raise when they are given something foreign
            raise UserError(
                f"the training state in {checkpoints.path(step)} does not fit this run "
                f"({type(error).__name__}: {error}); delete that folder to resume from the "
                "checkpoint before it"
            ) from error
        self.step = step
        self.run.rewind_metrics(step)

    def fit(self) -> int:
        """Train to the end or until asked to stop; the exit code of a stop, 0 at the end.

        Raises:
            TrainingError: loss or gradient is NaN or infinite.
        """
        total = self.experiment.train.num_steps
        with ExitStack() as stack:
            stop = stack.enter_context(StopRequest())
            progress = stack.enter_context(Progress(self.step, total, self.task.shown))
            log = stack.enter_context(MetricsLog(self.run, self.step))
            while self.step < total:
                self._train_step()
                progress.advance()
                self._report(progress, log)
                if stop.signal is not None:
                    if self.step not in self.run.checkpoints.steps():
                        self._save()
                    return stop.exit_code
        return 0

    def _train_step(self) -> None:
        start = time.perf_counter()
        config = self.experiment.optimizer
        rate = config.learning_rate_at(self.step, self.experiment.train.num_steps)
        rate *= self.plateau.factor
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with self.experiment.train.autocast():
            result = self.task.training_loss(self.step)
        result.minimised.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            self.task.model.parameters(), config.clip_norm or math.inf
        )
        self._refuse_nonfinite(result, norm)
        self.optimizer.step()
        self.step += 1
        seconds = time.perf_counter() - start
        self._interval.add(result, norm, seconds)
        self.clock.add(result.solution, seconds)
        if result.solution is not None and result.phase == "equilibrium":
            self.statistics.add(result.solution)
        self._phase, self._rate = result.phase, rate

    def _report(self, progress: Progress, log: MetricsLog) -> None:
        config, last = self.experiment.train, self.step == self.experiment.train.num_steps
        if self.step % config.log_every == 0 or last:
            record = {
                "kind": "train",
                "step": self.step,
                "phase": self._phase,
                "learning_rate": self._rate,
                **self._interval.record(),
            }
            self._interval = Interval()
            log.write(record)
            progress.metrics(record)
        improved = False
        if self.step % config.eval_every == 0 or last:
            improved = self._evaluate(progress, log)
        if improved or last or self.step % config.checkpoint_every == 0:
            self._save()

    def _evaluate(self, progress: Progress, log: MetricsLog) -> bool:
        with self.experiment.train.autocast():
            result = self.task.evaluate("valid")
        self.plateau.see(result.loss, self.experiment.optimizer)
        record = {"kind": "valid", "step": self.step, "loss": result.loss, **result.figures}
        if result.num_evals.numel():
            record["num_evals"] = result.num_evals.double().mean().item()
            record["relative_residual"] = result.relative_residual.double().mean().item()
        log.write(record)
        progress.validation(record)
        self._valid_loss = result.loss
        return result.loss < self.run.checkpoints.best_loss()

    def _save(self) -> None:
        checkpoints = self.run.checkpoints
        checkpoints.save(self.step, self.task.model, self._training_state())
        if self._valid_loss is not None and self._valid_loss < checkpoints.best_loss():
            checkpoints.mark_best(self.step, self._valid_loss)
        self._valid_loss = None
        checkpoints.prune(self.experiment.train.keep_checkpoints)

    def _restore(self, state: dict[str, Any]) -> None:
        device = next(self.task.model.parameters()).device
        self.optimizer.load_state_dict(state["optimizer"])
        self.task.load_state_dict(state["task"])
        self.clock = Clock(**state["clock"])
        self.statistics.load_state_dict(state["statistics"])
        self._interval = Interval.from_state_dict(state["interval"], device)
        self.plateau = Plateau(**state["plateau"])
        torch.set_rng_state(state["random"]["cpu"])
        if torch.cuda.is_available() and state["random"]["cuda"]:
            torch.cuda.set_rng_state_all(state["random"]["cuda"])

    def _training_state(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "task": self.task.state_dict(),
            "clock": vars(self.clock),
            "statistics": self.statistics.state_dict(),
            "interval": self._interval.state_dict(),
            "plateau": vars(self.plateau),
            "random": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            },
        }

    def _refuse_nonfinite(self, result: StepLoss, gradient_norm: torch.Tensor) -> None:
        if math.isfinite(result.loss.item()) and math.isfinite(gradient_norm.item()):
            return
        what = "loss" if not math.isfinite(result.loss.item()) else "gradient"
        solve = "" if result.solution is None else f"; {_describe_solve(result.solution)}"
        raise TrainingError(
            f"the {what} of step {self.step + 1} is not finite (loss {result.loss.item():.4g}, "
            f"gradient norm {gradient_norm.item():.4g}{solve}); lower "
            "--optimizer.learning-rate, lengthen the warm-up or --task.pretrain-steps, or allow "
            f"more solver steps. Checkpoints in {self.run.checkpoints.folder} are untouched"
        )


def _describe_solve(solution: Solution) -> str:
    failed = int((solution.status != 0).sum())
    return (
        f"forward solve: {failed} of {solution.status.numel()} samples missed the tolerance, "
        f"worst relative residual {solution.relative_residual.max().item():.2g}"
    )
