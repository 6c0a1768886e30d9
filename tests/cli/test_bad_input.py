"""What cannot work: one sentence with what to do, code 2, no traceback, nothing overwritten."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from equilibria.data.characters import CharacterVocabulary
from equilibria.models.deq_transformer import DEQTransformerConfig


def _refused(result: Any, message: str) -> None:
    assert result.code == 2, (result.out, result.err)
    assert re.search(message, result.text), result.text
    assert "Traceback" not in result.out + result.err
    assert result.out == ""


def _bytes(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pydoc-charcters"], "no recipe is called 'pydoc-charcters'; did you mean 'pydoc-char"),
        (["nothing.json"], "nothing.json is missing; give a recipe's name or the config.json"),
        (["pydoc-characters", "more"], "Unrecognized options: more"),
        (["--train.num-stepz", "5"], r"--train\.num-stepz.*Perhaps you meant.*--train\.num-steps"),
        (["--train.num_stepz", "5"], r"Perhaps you meant.*--train\.num-steps"),
        (["--model.solve.solver", "andersn"], "'andersn'; did you mean 'anderson'"),
        (["--model.solve.solver", "implicit"], "no Solver is called 'implicit'.*there are: anders"),
        (["--model.solve.solver", "None"], "'None' cannot be read; write a name"),
        (
            ["--model.solve.solver", "anderson(histry_size=3)"],
            "no option 'histry_size'; did you mean 'history_size'",
        ),
        (["--model.solve.solver", "anderson(history_size=0)"], "history_size=0 must be an integer"),
        (["--model.solve.adjoint", "implict"], "'implict'; did you mean 'implicit'"),
        (["--model.solve.adjoint", "implicit(solver=pickard)"], "did you mean 'picard'"),
        (["--model.solve.eval-solver", "brodyen"], "'brodyen'; did you mean 'broyden'"),
        (["--model.norm", "pots"], "'pots' is not one of.*'post'"),
        (["--optimizer.name", "adan"], "'adan' is not one of.*'adam'"),
        (["--train.num-steps", "many"], "many"),
        (["--train.num-steps", "1.5"], "1.5"),
        (["--train.num-steps", "0"], "num_steps=0 must be an integer of at least 1"),
        (["--train.num-steps"], "--train.num-steps"),
        (["--model.dropout", "1.5"], "dropout=1.5 must be at least 0 and below 1"),
        (["--model.num-heads", "3"], "num_heads=3 does not divide d_model=8"),
        (["--model.solve.max-steps", "0"], "max_steps=0 allows no step; give"),
        (["--model.solve.rtol", "-1"], "rtol=-1.0 must be a finite number of at least 0"),
        (["--optimizer.learning-rate", "0"], "learning_rate=0.0 must be"),
        (["--task.memory-length", "-1"], "memory of -1 positions is impossible; give 0"),
        (["--task.pretrain-layers", "0"], "pretrain_layers=0 must be"),
        (["--devices", "3"], "cannot be shared by 3 processes.*give a multiple"),
        (["--strategy", "fspd"], "'fspd' is not one of ddp, fsdp; did you mean 'fsdp'"),
        (["--nodes", "2"], "torchrun --nnodes 2 --nproc-per-node 1"),
        (["--train.batch-chunks", "99"], "4 rows of a process cannot be cut into 99 chunks"),
        (["--train.restarts", "-1"], "restarts"),
        (["--data.path", "nowhere.txt"], "there is no file '.*nowhere.txt'"),
        (["--data.path", "."], "is a directory; give the path of one text file"),
        (["--data.valid-fraction", "0.9"], "leave no text to train on"),
        (["--task.segment-length", "5000"], "cannot fill one segment of length 5000"),
    ],
)
def test_training_that_cannot_begin_makes_no_folder(
    cli: Any, tiny: list[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    source = [arguments.pop(0)] if not arguments[0].startswith("-") else []
    place = ["--train.folder", str(tmp_path / "runs")]
    _refused(cli("train", *source, *tiny, *place, *arguments), message)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; give a file with text"),
        (b" \n\t\n", "holds only white space"),
        (b"caf\xe9 au lait\n" * 100, "is not UTF-8 text: byte 3 is 0xe9"),
        (b"one short line\n", "each needs at least 2|cannot fill one segment"),
        (b"one line that is long enough to be split but not to be cut up\n", "cannot fill one seg"),
    ],
)
def test_text_that_cannot_be_learnt(
    cli: Any, tiny: list[str], tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    place = ["--train.folder", tmp_path / "runs", "--data.path", file]
    _refused(cli("train", *tiny, *place), message)
    assert not (tmp_path / "runs").exists()


def test_no_gpu(cli: Any, tiny: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    place = ["--train.folder", tmp_path / "runs", "--train.device", "cuda"]
    _refused(cli("train", *tiny, *place), "PyTorch sees no GPU here; use --train.device cpu")
    assert not (tmp_path / "runs").exists()


def test_a_file_where_runs_should_go(cli: Any, tiny: list[str], tmp_path: Path) -> None:
    place = tmp_path / "runs"
    place.write_text("precious")
    _refused(cli("train", *tiny, "--train.folder", place), "choose another place with")
    assert place.read_text() == "precious"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config\.json cannot be read"),
        ("[]", "has no recipe and config; it is not the config of a run"),
        ('{"recipe": "pydoc-characters"}', "has no recipe and config"),
        ('{"recipe": "pydoc-chars", "config": {}}', "did you mean 'pydoc-characters'"),
        ('{"recipe": "pydoc-characters", "config": []}', "expected named options"),
        (
            '{"recipe": "pydoc-characters", "config": {"taks": {}}}',
            "unknown option 'taks'; did you mean 'task'",
        ),
        (
            '{"recipe": "pydoc-characters", "config": {"seed": "three"}}',
            "option 'seed' cannot be 'three'",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "resume", "eval", "generate"])
def test_a_damaged_configuration(
    cli: Any, run: Path, tmp_path: Path, content: str, message: str, command: str
) -> None:
    (run / "config.json").write_text(content)
    before = _bytes(tmp_path)
    arguments = ["train", "--resume", run] if command == "resume" else [command, run]
    _refused(cli(*arguments), message)
    assert _bytes(tmp_path) == before


def _remove_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def _empty_checkpoints(run: Path) -> None:
    _remove_checkpoints(run)
    (run / "checkpoints").mkdir()


def _cut(name: str) -> Callable[[Path], None]:
    def cut(run: Path) -> None:
        for file in (run / "checkpoints").glob(f"step-*/{name}"):
            file.write_bytes(file.read_bytes()[:-7])

    return cut


def _other_shape(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["config"]["model"]["d_inner"] = 10
    (run / "config.json").write_text(json.dumps(config))


def _other_text(run: Path) -> None:
    file = run.parent / "other.txt"
    file.write_text("another text altogether, of the same characters or not\n" * 9)
    config = json.loads((run / "config.json").read_text())
    config["config"]["data"]["path"] = str(file)
    (run / "config.json").write_text(json.dumps(config))


def _no_text(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["config"]["data"]["path"] = str(run.parent / "gone.txt")
    (run / "config.json").write_text(json.dumps(config))


def _remove(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def _write(name: str, content: str) -> Callable[[Path], Any]:
    return lambda run: (run / name).write_text(content)


LOOKS = ["resume", "eval", "generate"]


@pytest.mark.parametrize(
    ("damage", "commands", "message"),
    [
        (_remove_checkpoints, LOOKS, "holds no checkpoint; .* start it again with 'equilibria tr"),
        (_empty_checkpoints, LOOKS, "holds no checkpoint"),
        (_cut("model.safetensors"), LOOKS, "model.safetensors is truncated or damaged"),
        (_cut("training.pt"), ["resume"], "training.pt is missing, truncated or damaged.*delete"),
        (_other_shape, LOOKS, "has .* of shape .*the configuration or the text has changed since"),
        (_other_text, LOOKS, "the run was made with text of digest .*; use the same text"),
        (_no_text, LOOKS, "there is no file '.*gone.txt'"),
        (_remove("config.json"), LOOKS, "is no run folder: it has no config.json"),
        (_remove("environment.json"), LOOKS, "environment.json is missing; the run folder is inc"),
        (_write("environment.json", "[]"), LOOKS, "environment.json"),
        (_write("environment.json", '{"data": 3}'), LOOKS, "environment.json"),
        (_write("checkpoints/best.json", "{"), ["eval", "generate"], "best.json cannot be read"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_damaged_run(
    cli: Any,
    run: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    commands: list[str],
    message: str,
) -> None:
    damage(run)
    before = _bytes(tmp_path)
    for command in commands:
        arguments = ["train", "--resume", run] if command == "resume" else [command, run]
        _refused(cli(*arguments), message)
        assert _bytes(tmp_path) == before


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_run_that_is_not_there(cli: Any, run: Path, command: str) -> None:
    _refused(cli(command), f"{command} needs a run folder first: equilibria {command} RUN")
    _refused(cli(command, run.parent / "rum"), "rum is no folder; did you mean 'run'")
    _refused(cli(command, run / "config.json"), "config.json is no folder")
    _refused(cli(command, ""), "no run folder|is no folder")
    _refused(cli(command, "--seed", 3), "needs a run folder first")


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("eval", ["--max-stepz", "3"], "Perhaps you meant.*--max-steps"),
        ("eval", ["--max-steps", "0"], "max_steps=0 allows no step"),
        ("eval", ["--rtol", "-1"], "rtol=-1.0 must be"),
        ("eval", ["--mem-len", "-5"], "a memory of -5 positions is impossible; give 0"),
        ("eval", ["--streams", "0"], "eval_streams=0 must be an integer of at least 1"),
        ("eval", ["--solver", "andersen"], "'andersen'; did you mean 'anderson'"),
        ("eval", ["--split", "train"], "'train' is not one of valid, test"),
        ("eval", ["--checkpoint", "3"], "no checkpoint '3'; give 'best', 'last' or one of "),
        ("eval", ["--checkpoint", "bets"], "no checkpoint 'bets'; give 'best', 'last'"),
        ("eval", ["--checkpoint", "²"], "no checkpoint '²'"),
        ("eval", ["extra"], "Unrecognized options: extra"),
        ("generate", ["--prompt", ""], "the prompt is empty; give at least one character"),
        ("generate", ["--prompt", "Ünïcode"], "the text uses 'Ü', 'ï'.*does not have"),
        ("generate", ["--mem-len", "0"], "memory of 0 positions cannot carry .* give --mem-len"),
        ("generate", ["--temperature", "-1"], "temperature=-1.0 must be a number of at least 0"),
        ("generate", ["--top-k", "0"], "top_k=0 must be an integer of at least 1"),
        ("generate", ["--num-tokens", "0"], "num_tokens=0 must be an integer of at least 1"),
        ("generate", ["--num-token", "0"], "Perhaps you meant.*--num-tokens"),
        ("generate", ["--seed", "9" * 40], "seed"),
    ],
)
def test_options_of_commands_that_look_at_a_run(
    cli: Any, run: Path, tmp_path: Path, command: str, arguments: list[str], message: str
) -> None:
    before = _bytes(tmp_path)
    prompt = ["--prompt", "the"] if command == "generate" and "--prompt" not in arguments else []
    _refused(cli(command, run, *prompt, *arguments), message)
    assert _bytes(tmp_path) == before


def test_generation_without_memory_in_training(cli: Any, tiny: list[str], tmp_path: Path) -> None:
    """A model trained without memory still speaks: its segment is context enough."""
    place = ["--train.folder", tmp_path / "runs", "--task.memory-length", 0]
    assert cli("train", *tiny, *place, "--train.num-steps", 1).code == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert cli("generate", run, "--prompt", "the", "--num-tokens", 3).code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--resume"],
        ["--resume="],
        ["--resume", "{run}", "--train.num-steps", "3"],
        ["pydoc-characters", "--resume", "{run}"],
        ["--train.num-steps", "3", "--resume", "{run}"],
    ],
)
def test_resume_takes_a_folder_and_nothing_else(
    cli: Any, run: Path, tmp_path: Path, arguments: list[str]
) -> None:
    before = _bytes(tmp_path)
    given = [argument.format(run=run) for argument in arguments]
    _refused(cli("train", *given), "--resume takes one run folder and no other options")
    assert _bytes(tmp_path) == before


def test_resuming_what_is_no_run(cli: Any, tmp_path: Path) -> None:
    _refused(cli("train", "--resume", tmp_path / "nowhere"), "nowhere is no folder")
    _refused(cli("train", "--resume", tmp_path), "is no run folder: it has no config.json")


def _change_json(file: Path, path: str, value: Any) -> None:
    content = json.loads(file.read_text())
    place = content
    *names, last = path.split(".")
    for name in names:
        place = place[name]
    place[last] = value
    file.write_text(json.dumps(content))


def _commands(run: Path, text: Path) -> dict[str, list[Any]]:
    """Everything that makes a model of a run."""
    return {
        "eval": ["eval", run],
        "eval of a text": ["eval", run, "--text", text],
        "share": ["share", run, "--folder", run.parent / "shared"],
        "generate": ["generate", run, "--prompt", "the"],
        "resume": ["train", "--resume", run],
    }


@pytest.fixture
def only_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be made but of shapes."""
    kind = DEQTransformerConfig
    build = kind.build

    def guarded(self: Any, size: int) -> Any:
        assert torch.get_default_device().type == "meta", "a model was made without a look"
        return build(self, size)

    monkeypatch.setattr(kind, "build", guarded)


@pytest.mark.usefixtures("only_shapes")
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("d_model", 100_000_000, "of shape"),
        ("d_model", 10**30, "no model can be made"),
        ("d_inner", 10**9, "of shape"),
    ],
)
def test_a_configuration_larger_than_the_weights(
    cli: Any, run: Path, text_file: Path, option: str, value: int, message: str
) -> None:
    _change_json(run / "config.json", f"config.model.{option}", value)
    for arguments in _commands(run, text_file).values():
        _refused(cli(*arguments), message)
    page = run.parent / "page.html"
    result = cli("report", run, "--measure", "--output", page)
    assert (result.code, page.exists()) == (0, True)
    assert re.search(f"Nothing was measured: .*{message}", result.text)


@pytest.mark.usefixtures("only_shapes")
@pytest.mark.parametrize(
    ("size", "message"),
    [
        (10**12, "of shape"),
        (10**30, "no model can be made"),
        (True, "has the size 'True'"),
        (-3, "has the size '-3'"),
        (0, "has the size '0'"),
        ("7", "has the size '7'"),
        (2.5, "has the size '2.5'"),
    ],
)
def test_a_recorded_size_of_the_vocabulary_that_is_none(
    cli: Any, run: Path, text_file: Path, size: Any, message: str
) -> None:
    _change_json(run / "environment.json", "data.vocabulary_size", size)
    for name in ("eval of a text", "share"):
        _refused(cli(*_commands(run, text_file)[name]), message)


def test_a_vocabulary_of_another_size(cli: Any, run: Path, text_file: Path) -> None:
    file = run / "vocabulary.json"
    file.write_text(CharacterVocabulary.from_text("abc").to_json())
    for name in ("eval of a text", "share"):
        _refused(cli(*_commands(run, text_file)[name]), "has 3 symbols, and by its environment")


@pytest.mark.parametrize("name", ["config.json", "environment.json", "checkpoints/best.json"])
@pytest.mark.parametrize("what", ["pipe", "device"])
def test_what_is_no_file_is_not_waited_for(
    cli: Any, run: Path, text_file: Path, name: str, what: str
) -> None:
    (run / name).unlink()
    if what == "pipe":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to("/dev/zero")
    for arguments in _commands(run, text_file).values():
        result = cli(*arguments)
        _refused(result, "no regular file")


@pytest.mark.parametrize("content", ["[]", '{"best_step": 12, "test_solves": 7}'])
def test_figures_that_are_none_are_not_shared(cli: Any, run: Path, content: str) -> None:
    content = content.replace("12", str(_best_step(run)))
    (run / "summary.json").write_text(content)
    result = cli("share", run, "--folder", run.parent / "shared")
    _refused(result, r"delete (it|summary\.json) to share without figures")


def _best_step(run: Path) -> int:
    return json.loads((run / "checkpoints" / "best.json").read_text())["best"][0]["step"]


def test_memory_that_runs_out_is_a_sentence(cli: Any, run: Path) -> None:
    _change_json(
        run / "config.json", "config.model.solve.eval_solver", f"anderson(history_size={10**15})"
    )
    _refused(cli("eval", run, "--max-steps", 10**15), "memory ran out .*; lower")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("metrics.jsonl", "folder"),
        ("metrics.jsonl", "pipe"),
        ("summary.json", "folder"),
        ("solves.json", "folder"),
        ("tensorboard", "file"),
        ("plots", "file"),
    ],
)
def test_something_else_where_a_resumed_run_writes(
    cli: Any, run: Path, name: str, what: str
) -> None:
    place = run / name
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    {"folder": Path.mkdir, "pipe": os.mkfifo, "file": Path.touch}[what](place)
    _refused(cli("train", "--resume", run), rf"{name} is no (file|folder).*; move it away")


@pytest.mark.parametrize("content", ["{", '{"best": [{"step": 12, "loss": NaN}]}', "[7]"])
def test_damaged_marks_are_found_before_training(cli: Any, run: Path, content: str) -> None:
    (run / "checkpoints" / "best.json").write_text(content)
    before = _bytes(run)
    _refused(cli("train", "--resume", run), r"best\.json.*; delete it to use the newest")
    assert _bytes(run) == before


def test_damaged_weights_are_gone_back_from_when_resuming(cli: Any, run: Path) -> None:
    (*_, newest) = sorted((run / "checkpoints").glob("step-*"))
    os.truncate(newest / "model.safetensors", 100)
    _refused(cli("train", "--resume", run), f"delete the folder .*{newest.name} to resume from")
    _refused(cli("eval", run, "--checkpoint", "last"), r"another checkpoint .*--checkpoint STEP")
