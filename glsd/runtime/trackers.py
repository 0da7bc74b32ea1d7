"""Further places that show the metrics of a run: Weights & Biases and MLflow, through accelerate's trackers."""

import importlib.util
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from glsd.errors import UserError, one_line, pick
from glsd.files import replacing

PROJECT = "glsd"
FILE = "trackers.json"  # in the run folder: the trackers' own names of the run, so that a resumed run goes on there
TENSORBOARD = "tensorboard"
PACKAGES = {TENSORBOARD: "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def tracker_names(trackers: str | Sequence[str]) -> list[str]:
    """Return the names in a list, or in a text with commas. Raises UserError for one that is unknown or not installed."""
    names = [name.strip() for name in trackers.split(",")] if isinstance(trackers, str) else list(trackers)
    names = [name for name in names if name]
    for name in names:
        package = pick(PACKAGES, name, "entry of trackers")
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"trackers has {name}, but the package {package} is missing: pip install 'glsd[{package}]'"
            )
    return names


class Trackers:
    """The trackers of one process, which get the metrics that people watch.

    They are views: metrics.jsonl has everything. One that fails later is left out, with a warning, and the run goes on.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, config: str, *, say: Callable[[str], None]
    ) -> None:
        """Start them for the run in ``folder``, or go on in theirs; config: YAML. Raises UserError for one that cannot start."""
        self._say = say
        self._open: dict[str, Any] = {}
        file = folder / FILE
        known: dict[str, str] = json.loads(file.read_text()) if file.is_file() else {}
        settings = _dotted(yaml.safe_load(config) or {})
        for name in names:
            if name == TENSORBOARD:
                continue
            try:
                tracker = _START[name](folder, known.get(name))
                if name == "wandb" or name not in known:  # MLflow never changes a parameter
                    tracker.store_init_configuration(settings)
                known[name] = _ID[name](tracker)
            except Exception as problem:  # whatever a server or a library says
                raise UserError(
                    f"tracker {name} cannot start: {one_line(problem)}; mend it, or leave it out of the trackers"
                ) from problem
            self._open[name] = tracker
        if self._open:
            with replacing(file) as draft:
                draft.write(json.dumps(known).encode())

    def log(self, values: Mapping[str, int | float], step: int) -> None:
        """Show the numbers of a step."""
        self._each(lambda tracker: tracker.log(dict(values), step=step))

    def picture(self, name: str, pixels: Any, step: int) -> None:
        """Show a picture (h w 3), uint8, where the tracker takes pictures."""
        self._each(lambda tracker: tracker.log_images({name: [pixels]}, step=step), among=("wandb",))

    def close(self) -> None:
        """End them."""
        self._each(lambda tracker: tracker.finish())
        self._open = {}

    def _each(self, do: Callable[[Any], None], among: Sequence[str] = tuple(PACKAGES)) -> None:
        for name in [name for name in self._open if name in among]:
            try:
                do(self._open[name])
            except Exception as problem:  # noqa: BLE001  # a server that is gone must not end a run of days
                del self._open[name]
                self._say(
                    f"warning: tracker {name} failed and is left out: {one_line(problem)}; metrics.jsonl has all"
                )


def _dotted(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= (
            _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + str(key): value}
        )
    return found


def _wandb(folder: Path, run: str | None) -> Any:
    from accelerate.tracking import WandBTracker

    run = run or uuid.uuid4().hex[:8]
    tracker = WandBTracker(PROJECT, id=run, resume="allow", dir=str(folder), name=folder.name)
    tracker.start()
    return tracker


def _mlflow(folder: Path, run: str | None) -> Any:
    from accelerate.tracking import MLflowTracker

    tracker = MLflowTracker(PROJECT, run_id=run, run_name=folder.name)
    tracker.start()
    return tracker


_START: dict[str, Callable[[Path, str | None], Any]] = {"wandb": _wandb, "mlflow": _mlflow}
_ID: dict[str, Callable[[Any], str]] = {
    "wandb": lambda tracker: str(tracker.run.id),
    "mlflow": lambda tracker: str(tracker.tracker.info.run_id),
}
