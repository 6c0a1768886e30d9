"""Metrics to experiment trackers, beside what the run folder holds: Weights & Biases, trackio.

The run folder is the truth: a tracker that cannot be reached costs its records and no run.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self, cast

from equilibria.core.errors import UserError, nearest
from equilibria.train.run_folder import RunFolder

_NAMES_FILE = "trackers.json"
_IDENTITY = re.compile(r"[A-Za-z0-9_-]{1,64}")
EXIT_FAILED = 1


class Tracker(Protocol):
    """Where the records of one run go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take in the numbers of a step, by names such as train/loss."""
        ...

    def finish(self, code: int, summary: Mapping[str, float]) -> None:
        """End, with the exit code of the training and its final figures."""
        ...


class WandbTracker:
    """Weights & Biases; WANDB_MODE=offline writes into the run folder only.

    Args:
        project: what the run belongs to there.
        run: its folder.
        identity: by which a resumed run goes on.
        config: shown beside the metrics.
        resumed: whether the run has been there before.
    """

    def __init__(
        self, project: str, run: RunFolder, identity: str, config: Mapping[str, Any], resumed: bool
    ) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=project,
            name=run.path.name,
            id=identity,
            dir=str(run.path),
            config=dict(config),
            resume="allow" if resumed else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Its own step may not go back, as ours does when a run resumes from a checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        self._run.log({**values, "step": step})

    def finish(self, code: int, summary: Mapping[str, float]) -> None:
        """See `Tracker.finish`."""
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=code)


class TrackioTracker:
    """trackio, which keeps runs on this machine, in TRACKIO_DIR if that is set.

    It knows no exit codes and no summaries; the summary is a last record.

    Args:
        project: what the run belongs to there.
        run: its folder, which gives it its name.
        identity: the end of that name, by which a resumed run goes on.
        config: shown beside the metrics.
        resumed: whether the run has been there before.
    """

    def __init__(
        self, project: str, run: RunFolder, identity: str, config: Mapping[str, Any], resumed: bool
    ) -> None:
        self._step = 0
        self._run = importlib.import_module("trackio").init(
            project=project,
            name=f"{run.path.name}-{identity}",
            config=dict(config),
            resume="allow" if resumed else "never",
            embed=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        self._step = step
        self._run.log(dict(values), step=step)

    def finish(self, code: int, summary: Mapping[str, float]) -> None:
        """See `Tracker.finish`."""
        if summary:
            self._run.log(dict(summary), step=self._step)
        self._run.finish()


Start = Callable[[str, RunFolder, str, Mapping[str, Any], bool], Tracker]
TRACKERS: dict[str, Start] = {"wandb": WandbTracker, "trackio": TrackioTracker}


def check_trackers(names: Sequence[str]) -> None:
    """Find out early whether these trackers can be used.

    Raises:
        UserError: there is no such one, or its package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(
                f"there is no tracker {name!r}{nearest(name, list(TRACKERS))}; train.trackers may "
                f"have {' and '.join(TRACKERS)}"
            )
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder that it wrote has no origin
            raise UserError(
                f"--train.trackers {name} needs its package: pip install 'equilibria[{name}]'"
            )


class Trackers:
    """The trackers of a run. Use as a context manager, which ends them.

    Nothing that goes wrong with them after their beginning is raised: see `told`.

    Args:
        started: by name.
    """

    exit_code = 0
    """Of the training, told to the trackers at the end."""

    def __init__(self, started: Mapping[str, Tracker] | None = None) -> None:
        self._started = dict(started or {})
        self._failed: set[str] = set()
        self._summary: dict[str, float] = {}
        self.complaints: list[str] = []
        """What nobody has been told yet."""

    @classmethod
    def start(
        cls, names: Sequence[str], project: str, run: RunFolder, config: Mapping[str, Any]
    ) -> Self:
        """Begin, or go on with a run that was tracked before.

        Raises:
            UserError: one of them cannot begin; of a run that goes on that is a complaint only.
        """
        goes_on = (run.path / _NAMES_FILE).exists()
        known, complaints = _known_identities(run) if goes_on and names else ({}, [])
        identities = {name: known.get(name) or secrets.token_hex(4) for name in names}
        started: dict[str, Tracker] = {}
        for name, identity in identities.items():
            try:
                started[name] = TRACKERS[name](project, run, identity, config, name in known)
            except Exception as error:  # whatever it raises
                reason = _first_line(error)
                if name not in known and not complaints:
                    raise UserError(
                        f"{name} could not begin ({reason}); log in to it, or leave out "
                        f"--train.trackers {name}. WANDB_MODE=offline needs no account"
                    ) from error
                complaints.append(f"{name} could not go on ({reason}) and gets no records")
        if identities:
            try:
                run.write_json(_NAMES_FILE, {**known, **identities})
            except OSError as error:
                complaints.append(
                    f"{_NAMES_FILE} could not be written ({error.strerror}); what is tracked now "
                    "will not be found again"
                )
        trackers = cls(started)
        trackers.complaints = complaints
        return trackers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        code = EXIT_FAILED if kind is not None and self.exit_code == 0 else self.exit_code
        for name in self._started:
            self._attempt(name, lambda tracker: tracker.finish(code, self._summary))

    def log(self, record: Mapping[str, Any]) -> None:
        """Send the numbers of a record of the metrics; its kind is the group of their names."""
        values = _numbers(record, f"{record['kind']}/")
        for name in self._started:
            self._attempt(name, lambda tracker: tracker.log(record["step"], values))

    def summarise(self, summary: Mapping[str, Any]) -> None:
        """Remember the final figures for the end."""
        self._summary = _numbers(summary, "summary/")

    def told(self) -> list[str]:
        """Complaints so far, each of them once."""
        complaints, self.complaints = self.complaints, []
        return complaints

    def _attempt(self, name: str, action: Callable[[Tracker], None]) -> None:
        try:
            action(self._started[name])
        except Exception as error:  # noqa: BLE001
            if name not in self._failed:
                self._failed.add(name)
                self.complaints.append(
                    f"{name} did not take a record ({_first_line(error)}); it gets further ones, "
                    "and metrics.jsonl has them all"
                )


def _known_identities(run: RunFolder) -> tuple[dict[str, str], list[str]]:
    """By which the trackers know a run; if that cannot be read none, and a complaint.

    A damaged file costs the connection to the records so far, and no run.
    """
    try:
        content = run.read_json(_NAMES_FILE)
        reason = f"{run.path / _NAMES_FILE} holds other things than identities"
    except UserError as error:
        content, reason = None, str(error).partition(";")[0]
    if isinstance(content, dict):
        known = cast(dict[str, Any], content)
        if all(isinstance(i, str) and _IDENTITY.fullmatch(i) for i in known.values()):
            return known, []
    return {}, [f"{reason}; it goes on as a new run there"]


def _numbers(record: Mapping[str, Any], group: str) -> dict[str, float]:
    """Numbers by name, also of dictionaries inside."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{group}{name}/")
        elif isinstance(value, int | float) and name != "step" and not isinstance(value, bool):
            found[f"{group}{name}"] = value
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
