"""`equilibria share`: a trained model as a folder for others, or on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from equilibria.cli.parsing import parse
from equilibria.cli.positional import split_run
from equilibria.cli.runs import (
    build_model,
    checkpoint_step,
    environment_of,
    open_run,
    vocabulary_of,
    vocabulary_size_of,
)
from equilibria.cli.train import load_config
from equilibria.core.errors import UserError
from equilibria.pretrained.card import Facts, card
from equilibria.pretrained.folder import FILES, SCRATCH, Reading, is_shared
from equilibria.pretrained.hub import Pretrained, reason
from equilibria.tasks.language_modeling import LanguageModelingConfig
from equilibria.train.experiment import Experiment, Vocabulary
from equilibria.train.files import disk_error, read_json
from equilibria.train.run_folder import RunFolder

_OWNER_AND_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


@dataclass(frozen=True)
class ShareOptions:
    """Where the model goes."""

    folder: Path | None = None
    """Folder to write: weights, configuration, vocabulary and model card."""
    push: str | None = None
    """OWNER/NAME on the Hugging Face hub; needs 'equilibria[hub]' and 'hf auth login'."""
    private: bool = False
    """Whether a repository that is made on the hub is private."""
    checkpoint: str = "best"
    """best, last, or a step."""


def main(arguments: Sequence[str]) -> int:
    """Write the folder, push it, or both."""
    path, rest = split_run(arguments, "share")
    options = parse(
        ShareOptions(), rest, prog="equilibria share RUN", description="Share a trained model."
    )
    _check(options)
    run, experiment = open_run(Path(path))
    pretrained = _pretrained(run, experiment, checkpoint_step(run, options.checkpoint))
    if options.folder is not None:
        try:
            pretrained.save_pretrained(options.folder)
        except OSError as error:  # before a file is opened, in the mixin
            raise disk_error(error) from error
        written = [name for name in FILES if (options.folder / name).exists()]
        print(f"{options.folder}: {', '.join(written)}")
    if options.push is not None:
        print(_push(pretrained, options.push, options.private))
    return 0


def _check(options: ShareOptions) -> None:
    if options.folder is None and options.push is None:
        raise UserError("say where the model goes: --folder DIR, --push OWNER/NAME, or both")
    if options.push is not None and not _OWNER_AND_NAME.fullmatch(options.push):
        raise UserError(f"--push {options.push!r} is not OWNER/NAME, such as me/my-model")
    folder = options.folder
    if folder is None or not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give --folder another name")
    others = [file for file in folder.iterdir() if file.name != SCRATCH]  # of a killed process
    if others and not is_shared(folder):
        raise UserError(
            f"{folder} holds other things than a shared model; give --folder a new or empty folder"
        )


def _pretrained(run: RunFolder, experiment: Experiment, step: int) -> Pretrained:
    """The model of a checkpoint with its card; the data are not needed."""
    environment, size = environment_of(run), vocabulary_size_of(run, experiment)
    # First, because a vocabulary may be as large as its size says.
    model = build_model(run, experiment.model, step, size)
    vocabulary = vocabulary_of(run, experiment)
    task = experiment.task
    reading = None
    if isinstance(task, LanguageModelingConfig):
        reading = Reading(task.segment_length, task.memory_length_in_evaluation)
    return Pretrained(
        model.eval(),
        experiment.model,
        vocabulary_size=size,
        vocabulary=vocabulary,
        reading=reading,
        card=_card(_facts(run, experiment, step, model, environment, vocabulary), run),
    )


def _card(facts: Facts, run: RunFolder) -> str:
    try:
        return card(facts)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # of figures that are none, which only somebody else can have put there
        raise UserError(
            f"summary.json or environment.json in {run.path} is damaged "
            f"({type(error).__name__}: {str(error)[:100]}); restore them, or delete summary.json "
            "to share without figures"
        ) from error


def _facts(
    run: RunFolder,
    experiment: Experiment,
    step: int,
    model: nn.Module,
    environment: dict[str, Any],
    vocabulary: Vocabulary | None,
) -> Facts:
    recipe, _, description = load_config(str(run.config_file))
    return Facts(
        recipe=recipe,
        description=description,
        step=step,
        experiment=experiment,
        num_parameters=sum(p.numel() for p in model.parameters()),
        is_text=vocabulary is not None,
        is_converted=run.conversion_file.exists(),
        environment=environment,
        summary=_summary(run, step),
    )


def _summary(run: RunFolder, step: int) -> dict[str, Any]:
    """The final figures, if they are of this checkpoint."""
    file = run.path / "summary.json"
    advice = "delete it to share without figures"
    summary = read_json(file, advice) if file.exists() else {}
    if not isinstance(summary, dict):
        raise UserError(f"{file} holds no figures; {advice}")
    return summary if summary.get("best_step") == step else {}


def _push(pretrained: Pretrained, name: str, private: bool) -> str:
    try:
        return str(pretrained.push_to_hub(name, private=private or None))
    except UserError:
        raise
    except Exception as error:
        # huggingface_hub passes on whatever the layers below it raise
        raise UserError(
            f"{name} cannot be pushed to the hub ({reason(error)}); log in with 'hf auth login', "
            "check the name and the connection, and call again"
        ) from error
