"""What the processes of tests/train/test_distributed.py run; started by torchrun, not by pytest.

    torchrun ... processes.py CONFIG.json RESULTS

CONFIG.json holds options of the run below, and the number of its processes.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from equilibria.adjoints.implicit import Implicit
from equilibria.data.character_corpus import CharacterCorpusConfig
from equilibria.models.config import SolveConfig
from equilibria.models.deq_transformer import DEQTransformerConfig
from equilibria.models.deq_trellisnet import DEQTrellisNetConfig
from equilibria.solvers.picard import Picard
from equilibria.tasks.language_modeling import LanguageModelingConfig
from equilibria.train.config_file import from_json
from equilibria.train.engine import Engine, start_engine
from equilibria.train.experiment import Experiment, TrainConfig
from equilibria.train.files import write_text
from equilibria.train.launch import leave
from equilibria.train.loop import Trainer
from equilibria.train.optimizers import OptimizerConfig
from equilibria.train.run_folder import RunFolder

# Plain iteration magnifies no rounding, which differs with the size of the batch.
SOLVE = SolveConfig(
    solver=Picard(), rtol=1e-10, max_steps=15, adjoint=Implicit(rtol=1e-8, max_steps=40)
)
MODELS = {
    "transformer": DEQTransformerConfig(
        d_model=8, num_heads=2, d_inner=12, dropout=0.0, embedding_dropout=0.0, init_std=0.05,
        solve=SOLVE,
    ),
    "trellisnet": DEQTrellisNetConfig(
        d_embed=6, d_hidden=5, dropout=0.0, input_dropout=0.0, output_dropout=0.0, init_std=0.05,
        solve=SOLVE,
    ),
}  # fmt: skip


def experiment(folder: Path, options: dict[str, Any]) -> Experiment:
    """Ten steps on four streams without dropout, unrolled first."""
    text = folder / "text.txt"
    if not text.exists():  # at once, because another process may be about to read it
        write_text(text, "the quick brown dog jumps over a lazy cow. but why?\n" * 8)
    base = Experiment(
        data=CharacterCorpusConfig(path=text, valid_fraction=0.1, test_fraction=0.1),
        model=MODELS[options.get("model", "transformer")],
        task=LanguageModelingConfig(
            batch_size=4, segment_length=8, memory_length=6, pretrain_steps=2, eval_streams=2
        ),
        optimizer=OptimizerConfig(warmup_steps=3, learning_rate=1e-2),
        train=TrainConfig(
            num_steps=10, log_every=1, eval_every=4, checkpoint_every=5, keep_checkpoints=9,
            device="cpu", folder=folder / "runs",
        ),
    )  # fmt: skip
    changed = from_json(base, options.get("changes", {}))
    return replace(changed, train=replace(changed.train, **options.get("train", {})))


def run(folder: Path, name: str, options: dict[str, Any], engine: Engine) -> None:
    """Train in float64 in the folder of this name; go on where a run is there already."""
    chosen = experiment(folder, options)
    task = chosen.build_task(chosen.data.load())
    task.model.double()
    run_folder = RunFolder.create_named(folder / name)
    trainer = Trainer(chosen, task, run_folder, engine)
    if run_folder.checkpoints.steps():
        trainer.resume()
    trainer.fit()


def main(config_file: str, folder: str) -> None:
    """All runs of the configuration, one after the other."""
    torch.set_num_threads(1)
    for name, options in json.loads(Path(config_file).read_text()).items():
        train = options["train"]
        engine = start_engine(torch.device("cpu"), train["devices"], 1, train["strategy"])
        run(Path(folder), name, options, engine)
    torch.distributed.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
