"""`equilibria convert`: bring weights of the first public DEQ code, or torchdeq's, into ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from equilibria import recipes
from equilibria.cli.parsing import long_names, parse
from equilibria.compat.convert import Converted, convert
from equilibria.core.errors import UserError
from equilibria.train.checkpoint import Snapshot
from equilibria.train.experiment import Corpus, DataConfig, Experiment
from equilibria.train.files import write_text
from equilibria.train.run_folder import RunFolder


@dataclass(frozen=True)
class ConvertOptions:
    """Where the rest of the configuration is from, and where the result goes."""

    data: DataConfig
    recipe: str = "wt103-deq-transformer"
    """Recipe whose data, task and solver settings the run gets; what no tensor tells of the model
    (layer norm, window, dropouts) is taken from it, too."""
    folder: Path = Path("runs")
    """Where the run folder is made."""


def main(arguments: Sequence[str]) -> int:
    """Make a run folder of an old checkpoint, which `equilibria eval` can score."""
    given = long_names(arguments, {"--data": "--data.folder"})  # as for training
    source = given.pop(0) if given and not given[0].startswith("-") else None
    recipe = _recipe(given)
    experiment = recipes.load(recipe).experiment
    options = parse(
        ConvertOptions(experiment.data, recipe),
        given,
        prog="equilibria convert CHECKPOINT",
        description="Read language models of locuslab/deq (.pkl or .pth) or of torchdeq's "
        "collection (--recipe wt103-torchdeq). A text of your own: --data FOLDER --data.name None.",
    )
    if source is None:
        raise UserError("give the checkpoint to convert: equilibria convert CHECKPOINT [options]")
    converted = convert(Path(source), experiment.model)
    run = _write(replace(experiment, model=converted.config, data=options.data), converted, options)
    print(converted.report())
    print(
        f"\n{len(converted.mapped)} tensors mapped, {len(converted.left)} not needed; "
        f"{converted.vocabulary_size:,} tokens; run folder {run.path}"
    )
    return 0


def _recipe(given: Sequence[str]) -> str:
    """The recipe that is named, read first: the other options are those of its data."""
    found = ConvertOptions.recipe
    for word, following in pairwise([*given, found]):
        name, equals, value = word.partition("=")
        if name == "--recipe":
            found = value if equals else following
    return found


def _write(experiment: Experiment, converted: Converted, options: ConvertOptions) -> RunFolder:
    data = experiment.data.load()
    size = len(data.vocabulary) if isinstance(data, Corpus) else 0
    if size != converted.vocabulary_size:
        raise UserError(
            f"the checkpoint has {converted.vocabulary_size:,} token ids, and the text has "
            f"{size:,}; give the text it was trained on (--recipe, or --data FOLDER)"
        )
    task = experiment.build_task(data)
    task.model.load_state_dict(converted.weights)
    run = RunFolder.create(options.folder, f"{options.recipe}-converted")
    run.write_config(options.recipe, experiment)
    run.write_json("environment.json", {"data": data.describe()})
    if isinstance(data, Corpus):
        run.write_json("vocabulary.json", json.loads(data.vocabulary.to_json()))
    run.checkpoints.save(0, Snapshot(task.model.state_dict(), {}))
    write_text(run.conversion_file, converted.report() + "\n")
    return run
