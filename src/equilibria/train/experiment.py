"""The whole configuration of a run, as one tree of typed, frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from equilibria.core.errors import UserError
from equilibria.core.parameters import check_not_negative, check_positive_integer
from equilibria.data.segments import Segment, TrainingSegments, evaluation_segments
from equilibria.models.config import ModelConfig
from equilibria.tasks.copy_memory import CopyMemory, CopyMemoryConfig, CopySource
from equilibria.tasks.language_modeling import LanguageModeling, LanguageModelingConfig
from equilibria.tasks.task import Share, Split, Task, TaskConfig, check_chunks
from equilibria.train.engine import Strategy
from equilibria.train.fit import check_fits
from equilibria.train.optimizers import OptimizerConfig

if TYPE_CHECKING:
    from equilibria.train.tensor_files import TensorFiles


class Vocabulary(Protocol):
    """Symbols to ids and back."""

    def encode(self, text: str) -> Tensor: ...
    def decode(self, ids: Any) -> str: ...
    def continued(self, text: str, ids: Any) -> str: ...
    def to_json(self) -> str: ...
    def __len__(self) -> int: ...


class Data(Protocol):
    """What a task learns from; each task says what else it needs of it."""

    def describe(self) -> dict[str, object]: ...


@runtime_checkable
class Corpus(Data, Protocol):
    """Token ids (T,) of three splits, and what they stand for."""

    @property
    def train(self) -> Tensor: ...
    @property
    def valid(self) -> Tensor: ...
    @property
    def test(self) -> Tensor: ...
    @property
    def vocabulary(self) -> Vocabulary: ...


@runtime_checkable  # the report asks whether general compression compares
class CharacterCorpus(Corpus, Protocol):
    """A corpus whose tokens are characters."""

    @property
    def train_text(self) -> str: ...
    @property
    def test_text(self) -> str: ...


@runtime_checkable  # the command line asks whether the default is one, to offer its options
class DataConfig(Protocol):
    """Which data to read."""

    def load(self) -> Data: ...


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run, and how often it reports and saves."""

    num_steps: int = 600
    """Optimiser steps."""
    log_every: int = 10
    """Steps per line of metrics."""
    eval_every: int = 100
    """Steps between evaluations on the validation split."""
    checkpoint_every: int = 200
    """Steps between checkpoints; one is also written at the end and on Ctrl-C."""
    keep_checkpoints: int = 2
    """Latest checkpoints to keep, besides the best on the validation split."""
    keep_best: int = 1
    """Checkpoints to keep for their validation loss."""
    save_in_background: bool = False
    """Write checkpoints while training goes on, from a copy in memory."""
    batch_chunks: int = 1
    """Parts that the batch of a process is computed in, one after the other: less memory, the same
    gradients."""
    max_nonfinite_steps: int = 10
    """Steps in a row with a loss or gradient that is not finite, which are skipped, before
    training stops."""
    devices: int = 1
    """Processes per machine, each with a device (or a share of the CPU) of its own. They share the
    batch; its size is that of all together."""
    nodes: int = 1
    """Machines; for more than one start the command on each by torchrun or Slurm."""
    strategy: Strategy = "ddp"
    """How several processes train: ddp averages gradients; fsdp also keeps only a shard of the
    parameters and of the optimiser in each."""
    restarts: int = 3
    """How often a training of several processes on one machine is started again from its last
    checkpoint when a process dies."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes a GPU if there is one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the arithmetic of the model in training and evaluation: bfloat16 by autocast. Weights,
    solver states and losses stay in float32."""
    folder: Path = Path("runs")
    """Where run folders are made."""
    trackers: tuple[str, ...] = ()
    """Where metrics go besides the run folder: wandb, trackio, or both."""
    project: str = "equilibria"
    """What the run belongs to there."""

    def __post_init__(self) -> None:
        for name in (
            "num_steps",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "keep_checkpoints",
            "keep_best",
            "batch_chunks",
            "max_nonfinite_steps",
            "devices",
            "nodes",
        ):
            check_positive_integer(name, getattr(self, name))
        check_not_negative("restarts", self.restarts)
        if self.strategy not in get_args(Strategy):
            raise UserError(f"strategy={self.strategy!r} is neither 'ddp' nor 'fsdp'")
        if self.precision not in ("float32", "bfloat16"):
            raise UserError(f"precision={self.precision!r} is neither 'float32' nor 'bfloat16'")

    def autocast(self) -> torch.autocast:
        """The context that the model runs in."""
        return torch.autocast(
            self.torch_device().type, torch.bfloat16, enabled=self.precision == "bfloat16"
        )

    def torch_device(self) -> torch.device:
        """The device to run on.

        Raises:
            UserError: cuda is asked for and there is none.
        """
        available = torch.cuda.is_available()
        if self.device == "cuda" and not available:
            raise UserError("device=cuda, but PyTorch sees no GPU here; use --train.device cpu")
        return torch.device("cuda" if available and self.device != "cpu" else "cpu")


@dataclass(frozen=True)
class Experiment:
    """A run: data, model, task, optimiser, training, and one seed."""

    data: DataConfig
    model: ModelConfig
    task: TaskConfig = LanguageModelingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    seed: int = 0
    """Seed of initial weights, dropout masks and samples."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed} must be between 0 and 2**63 - 1")
        if self.task.pretrain_steps and not hasattr(self.model, "solve"):
            raise UserError(
                f"pretrain_steps={self.task.pretrain_steps}, but {type(self.model).__name__} is "
                "an explicit model without an equilibrium to unroll; set it to 0"
            )

        num_processes = self.train.devices * self.train.nodes
        rows = Share(0, num_processes).rows(self.task.batch_size)
        check_chunks(rows.stop, self.train.batch_chunks)

    def build_task(self, data: Data, weights: TensorFiles | None = None) -> Task:
        """Make model and task with everything drawn from the seed.

        Args:
            data: what the task learns from.
            weights: that the model will get, which must fit before it is made.

        Raises:
            UserError: the task cannot learn from such data, or the weights are of another model.
        """
        match self.task:
            case LanguageModelingConfig() as config if isinstance(data, Corpus):
                model = self._build_model(len(data.vocabulary), weights)
                solve = getattr(self.model, "solve", None)
                return _language_modeling(model, config, data, solve, self.seed)
            case CopyMemoryConfig() as config if isinstance(data, CopySource):
                model = self._build_model(data.vocabulary_size, weights)
                return CopyMemory(model, config, data)
            case _:
                raise UserError(
                    f"{type(self.task).__name__} cannot learn from {type(data).__name__}; give "
                    "the experiment a task and data that belong together"
                )

    def _build_model(self, vocabulary_size: int, weights: TensorFiles | None) -> Any:
        if weights is not None:
            check_fits(weights, self.model, vocabulary_size)
        torch.manual_seed(self.seed)
        return self.model.build(vocabulary_size).to(self.train.torch_device())


def _language_modeling(
    model: Any, config: LanguageModelingConfig, corpus: Corpus, solve: Any, seed: int
) -> LanguageModeling:
    training = TrainingSegments(corpus.train, config.batch_size, config.segment_length)

    def evaluation(split: Split) -> Any:
        tokens = corpus.valid if split == "valid" else corpus.test
        return evaluation_segments(tokens, config.eval_streams, config.segment_length)

    return LanguageModeling(model, config, training, evaluation, solve, seed)


__all__ = ["Corpus", "Data", "DataConfig", "Experiment", "Segment", "TrainConfig", "Vocabulary"]
