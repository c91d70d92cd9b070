"""Where a run's lines and pictures are shown besides its own files: TensorBoard, Weights & Biases,
MLflow.

None of them may cost a run anything but the display: each lives in a thread of its own behind a
queue that drops what does not fit, is reported once if it fails, and is left alone from then on.
Imports none of them at the top.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import queue
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.storage import redact
from train.config import RunConfig
from train.process.outcome import write_json

Values = Mapping[str, float | int | None]
TRACKED_RUNS_FILE = "trackers.json"
"""Keeps the ids that services gave to a run, so that a resumed one goes on there."""
QUEUE_LENGTH = 1000
"""Lines that wait for a slow service; later ones are dropped."""
CLOSING_LIMIT_S = 30.0
"""Longest wait for a service at the end of a run."""


class Tracker(ABC):
    """One display. Every method may fail: `Background` is what a run talks to."""

    name: str

    @abstractmethod
    def open(self) -> None:
        """Begin, or go on with what was begun before in the same run folder."""

    @abstractmethod
    def log(self, step: int, values: Values) -> None:
        """Show one line of metrics."""

    @abstractmethod
    def picture(
        self,
        step: int,
        name: str,
        path: Path,
    ) -> None:
        """Show one PNG."""

    @abstractmethod
    def close(self) -> None:
        """Hand over what is left and end."""


class Background:
    """Talks to a tracker in a thread, so that neither its time nor its failures are the run's.

    Args:
        tracker: not yet open.
        warn: told once, in words for people, if the tracker fails; called from the thread.
        closing_limit_s: longest wait of `close`, in seconds.
    """

    def __init__(
        self,
        tracker: Tracker,
        *,
        warn: Callable[[str], None],
        closing_limit_s: float = CLOSING_LIMIT_S,
    ) -> None:
        self._tracker, self._warn, self._closing_limit_s = (
            tracker,
            warn,
            closing_limit_s,
        )
        self._orders: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUE_LENGTH)
        self._thread = threading.Thread(
            target=self._work, name=f"tracker-{tracker.name}", daemon=True
        )
        self._thread.start()

    def _work(self) -> None:
        try:
            self._tracker.open()
            while (order := self._orders.get()) is not None:
                order()
            self._tracker.close()
        except BaseException as error:  # noqa: BLE001 - these libraries raise SystemExit too
            reason = redact(" ".join(str(error).split())[:300]) or type(error).__name__
            self._warn(
                f"warning: {self._tracker.name} shows nothing more of this run: {reason}; training "
                "goes on"
            )

    def _order(self, order: Callable[[], None]) -> None:
        if self._thread.is_alive():
            with contextlib.suppress(
                queue.Full
            ):  # a point of a curve, which metrics.jsonl has
                self._orders.put_nowait(order)

    def log(self, step: int, values: Values) -> None:
        """Queue one line of metrics."""
        # A copy: the caller may go on with its dictionary before the thread looks.
        line = dict(values)
        self._order(lambda: self._tracker.log(step, line))

    def picture(
        self,
        step: int,
        name: str,
        path: Path,
    ) -> None:
        """Queue one PNG."""
        self._order(lambda: self._tracker.picture(step, name, path))

    def close(self) -> None:
        """Let the tracker finish, for a limited time."""
        # One limit for both waits: a full queue, and a service that does not answer.
        deadline = time.monotonic() + self._closing_limit_s
        try:
            self._orders.put(None, timeout=self._closing_limit_s)
        except queue.Full:
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))


def _numbers(values: Values) -> dict[str, float | int]:
    """Keep what can be drawn: neither None nor NaN."""
    numbers = {}
    for name, value in values.items():
        if value is not None and math.isfinite(value):
            numbers[name] = value
    return numbers


class WandbTracker(Tracker):
    """Weights & Biases. Offline with WANDB_MODE=offline in the environment; the key comes from its
    own login.

    Args:
        run_dir: local folder of the run; offline files go there.
        config: settings of the run, shown with it.
    """

    name = "Weights & Biases"

    def __init__(self, run_dir: Path, config: RunConfig) -> None:
        self._run_dir, self._config = run_dir, config
        self._run: Any = None

    def open(self) -> None:
        """Begin or go on."""
        import wandb

        run_id = _kept_id(self._run_dir, "wandb")
        if not run_id:
            # Kept before the service knows it: a start that is killed in between loses no run.
            run_id = _keep_id(
                self._run_dir,
                "wandb",
                uuid.uuid4().hex[:8],
            )
        self._run = wandb.init(
            project=self._config.log.wandb_project,
            name=self._config.run.name or self._config.recipe,
            dir=str(self._run_dir),
            id=run_id,
            resume="allow",
            config=_shown_settings(self._config),
            settings=wandb.Settings(console="off", silent=True, disable_git=True),
        )
        # Steps are an axis of our own: after going back, wandb's would refuse the steps that come a
        # second time.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Values) -> None:
        """Show one line."""
        line: dict[str, float | int] = {"step": step}
        for shown, value in _numbers(values).items():
            line[f"train/{shown}"] = value
        self._run.log(line)

    def picture(
        self,
        step: int,
        name: str,
        path: Path,
    ) -> None:
        """Show one PNG."""
        # Here and not at the top: wandb takes a second to import.
        import wandb

        self._run.log({name: wandb.Image(str(path)), "step": step})

    def close(self) -> None:
        """End the run there, and the process that wandb keeps beside it."""
        import wandb

        self._run.finish()
        wandb.teardown()


class MlflowTracker(Tracker):
    """MLflow: a server, or a local folder.

    Args:
        run_dir: local folder of the run.
        config: settings of the run, shown with it.
    """

    name = "MLflow"

    def __init__(self, run_dir: Path, config: RunConfig) -> None:
        self._run_dir, self._config = run_dir, config
        self._client: Any = None
        self._run_id = ""

    def open(self) -> None:
        """Begin or go on."""
        uri = self._config.log.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        uri = uri or str(self._run_dir.absolute() / "mlruns")
        if "://" not in uri:
            # A folder is a store only if this is said.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = Path(uri).absolute().as_uri()
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        self._run_id = _kept_id(self._run_dir, "mlflow")
        if self._run_id:
            try:
                self._client.update_run(self._run_id, status="RUNNING")
                return
            except MlflowException:  # made in another store, or deleted there
                self._run_id = ""
        name = self._config.log.mlflow_experiment
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(name)
        )
        created = self._client.create_run(
            experiment_id, run_name=self._config.run.name or self._config.recipe
        )
        self._run_id = _keep_id(self._run_dir, "mlflow", created.info.run_id)
        self._client.log_dict(
            self._run_id,
            _shown_settings(self._config),
            "config.json",
        )

    def log(self, step: int, values: Values) -> None:
        """Show one line."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        points = [
            Metric(
                name,
                float(value),
                now_ms,
                step,
            )
            for name, value in _numbers(values).items()
        ]
        self._client.log_batch(self._run_id, metrics=points)

    def picture(
        self,
        step: int,
        name: str,
        path: Path,
    ) -> None:
        """Show one PNG."""
        del step, name  # one file that is replaced: its title says the step
        self._client.log_artifact(self._run_id, str(path))

    def close(self) -> None:
        """End the run there."""
        self._client.set_terminated(self._run_id)


def start_trackers(
    config: RunConfig, run_dir: Path, *, warn: Callable[[str], None]
) -> Sequence[Background]:
    """Start the trackers that the settings name; rank 0 only.

    Args:
        config: settings of the run.
        run_dir: its local folder.
        warn: told if one fails.
    """
    # Each has a thread of its own: a server that hangs holds up neither the run nor the other.
    chosen: list[Tracker] = []
    if config.log.wandb == "on":
        chosen.append(WandbTracker(run_dir, config))
    if config.log.mlflow == "on":
        chosen.append(MlflowTracker(run_dir, config))
    return [Background(tracker, warn=warn) for tracker in chosen]


def check_trackers(config: RunConfig) -> None:
    """Refuse trackers that are not installed, before a run is started.

    Raises:
        ConfigError: a setting names a package that is not there.
    """
    missing = [
        name
        for name, switch in (("wandb", config.log.wandb), ("mlflow", config.log.mlflow))
        if switch == "on" and importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ConfigError(
            "; ".join(
                f"log.{name} is on, but {name} is not installed" for name in missing
            )
            + ": pip install -c constraints.txt -e '.[tracking]', or leave it off"
        )


def _shown_settings(config: RunConfig) -> dict[str, Any]:
    """Give the settings as JSON types; URIs without what may be secret in them."""
    shown: dict[str, Any] = without_secrets(config.model_dump(mode="json"))
    return shown


def without_secrets(value: Any) -> Any:
    """Give settings of any depth with every text redacted."""
    if isinstance(value, dict):
        return {name: without_secrets(inner) for name, inner in value.items()}
    return redact(value) if isinstance(value, str) else value


def _kept_id(run_dir: Path, name: str) -> str:
    try:
        text = (run_dir / TRACKED_RUNS_FILE).read_text(encoding="utf-8")
        return str(json.loads(text).get(name, ""))
    except (OSError, ValueError, AttributeError):
        return ""


_ids_lock = threading.Lock()
"""Both trackers' threads write one file."""


def _keep_id(run_dir: Path, name: str, run_id: str) -> str:
    with _ids_lock:
        kept = {other: _kept_id(run_dir, other) for other in ("wandb", "mlflow")}
        kept[name] = run_id
        known = {key: value for key, value in kept.items() if value}
        write_json(run_dir / TRACKED_RUNS_FILE, known)
    return run_id
