"""How long the demo trains and measures: chosen once by this machine's speed, then kept.

The learning rate of every step depends on the number of steps. A run that is resumed must therefore
keep its number, however fast the machine is that day.
"""

from __future__ import annotations

import bisect
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from train.demo.machine import Found, Speed
from train.demo.pictures import Pictures
from train.process.outcome import write_json
from train.recipes import DEMO_MINUTES, RECIPES
from train.report.meter import format_duration

PLAN_FILE = "demo.json"
FEWEST_STEPS = 200
"""Steps that show learning: the held-out loss is then 0.81 of that of painting by the mean colour,
and neighbours are found better than without training. 100 steps show neither
(docs/benchmarks/demo.md)."""
EVALUATION_S = 45.0
"""Seconds that the evaluation may take."""
FEWEST_IMAGES = 160
"""Images of each dataset that are measured at least; the shares of fewer are mostly chance."""
ALL_IMAGES = 20_000
"""Images of each dataset that are measured at most, as `train.evaluate` has it."""
STARTS = 12
"""Times that torch is imported after the plan: two launches of three processes, evaluation, export,
and what a run does once besides its steps, in the same unit."""


@dataclass(frozen=True)
class Asked:
    """What the user asks for; 0 leaves the choice to the demo.

    Attributes:
        steps: optimizer steps.
        minutes: minutes of training.
    """

    steps: int = 0
    minutes: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What a run of the demo does.

    Attributes:
        steps: optimizer steps.
        precision: `engine.precision`.
        max_images: images of each dataset that the evaluation reads at most.
        asked: what the user asked for when it was chosen.
    """

    steps: int
    precision: str
    max_images: int
    asked: Asked = Asked()


def kept_plan(run_dir: Path, asked: Asked) -> Plan | None:
    """Read the plan that a run was started with.

    Args:
        run_dir: the run's folder.
        asked: what the user asks for now.

    Returns:
        The plan; None if there is none yet, or if the user now asks for something else.
    """
    # A run that was started before plans were kept still has its settings.
    plan = _plan_of_file(run_dir) or _plan_of_settings(run_dir)
    if plan is None or asked not in (Asked(), plan.asked):
        return None
    return plan


def _plan_of_file(run_dir: Path) -> Plan | None:
    path = run_dir / PLAN_FILE
    try:
        text = path.read_text(encoding="utf-8")
        return TypeAdapter(Plan).validate_json(text)
    # A file that another version wrote is as good as none: then the run's settings are read.
    except (OSError, ValidationError):
        return None


def _plan_of_settings(run_dir: Path) -> Plan | None:
    path = run_dir / "config.toml"
    try:
        text = path.read_text(encoding="utf-8")
        settings = tomllib.loads(text)
        steps = settings["train"]["steps"]
        precision = settings["engine"]["precision"]
        return Plan(steps, precision, ALL_IMAGES)
    except (OSError, tomllib.TOMLDecodeError, KeyError):
        return None


def keep_plan(run_dir: Path, plan: Plan) -> None:
    """Write the plan into the run's folder."""
    write_json(run_dir / PLAN_FILE, asdict(plan))


def choose_plan(asked: Asked, found: Found, speed: Speed, pictures: Pictures) -> Plan:
    """Choose how many steps to take and how many images to measure.

    Args:
        asked: what the user asks for.
        found: what this machine has.
        speed: how fast it is.
        pictures: what there is to measure.
    """
    steps = asked.steps or choose_steps(asked.minutes, step_s=speed.step_s)
    max_images = choose_images(pictures, features_per_s=speed.features_per_s)
    return Plan(
        steps=steps,
        precision=found.precision,
        max_images=max_images,
        asked=asked,
    )


def choose_steps(minutes: float, *, step_s: float) -> int:
    """Choose the number of steps.

    Without `minutes`, it is the recipe's number on every machine that is fast enough for it, so
    that their figures compare.

    Args:
        minutes: how long to train; 0 chooses.
        step_s: seconds of a step.
    """
    limit_s = 60 * (minutes or DEMO_MINUTES)
    fitting = int(limit_s / step_s)
    if minutes:
        # Two is the fewest that can be stopped half-way.
        return max(2, fitting)
    recipe_steps: int = RECIPES["demo"]["train"]["steps"]
    # Tens: nobody should take the last digit for something.
    rounded = fitting // 10 * 10
    return min(recipe_steps, max(FEWEST_STEPS, rounded))


def choose_images(pictures: Pictures, *, features_per_s: float) -> int:
    """Choose how many images of each dataset the evaluation reads at most.

    Args:
        pictures: what there is.
        features_per_s: images per second.
    """
    affordable = EVALUATION_S * features_per_s

    def cost(max_images: int) -> int:
        return images_to_read(pictures, max_images)

    # The largest number whose cost is still affordable; the cost only grows with the number.
    numbers = range(ALL_IMAGES + 1)
    largest = bisect.bisect_right(numbers, affordable, key=cost) - 1
    # Rather late than meaningless: below this a share is mostly chance.
    return max(FEWEST_IMAGES, largest)


def images_to_read(pictures: Pictures, max_images: int) -> int:
    """Count the images that the evaluation puts through a model.

    Held-out images are scored once. With labels, a trained and an untrained encoder describe them
    and the training images.
    """
    num_val = min(pictures.num_val, max_images)
    if not pictures.num_classes:
        return num_val
    num_train = min(pictures.num_train, max_images)
    num_described = num_val + num_train
    return num_val + 2 * num_described


def explain(plan: Plan, found: Found, speed: Speed, pictures: Pictures) -> str:
    """Say how long the demo will take, and why it does what it does."""
    training_s = plan.steps * speed.step_s
    num_read = images_to_read(pictures, plan.max_images)
    measuring_s = num_read / speed.features_per_s
    starting_s = STARTS * found.start_s
    total_s = training_s + measuring_s + starting_s
    lines = [
        found.explain_precision(),
        f"a step takes {speed.step_s:.2f} s here: {plan.steps} steps, about "
        f"{format_duration(training_s)} of training, about {format_duration(total_s)} in all",
    ]
    if plan.steps < FEWEST_STEPS:
        lines.append(
            f"{plan.steps} steps are too few to show learning: it takes {FEWEST_STEPS}"
        )
    # With a little room: a number of steps that was rounded is not "slow".
    elif plan.asked == Asked() and training_s > 60 * DEMO_MINUTES * 1.05:
        lines.append(
            f"this machine is slow: {plan.steps} steps are the fewest that show learning. "
            "Give --steps or --minutes for less"
        )
    num_images = max(pictures.num_train, pictures.num_val)
    if plan.max_images < num_images:
        lines.append(
            f"it will be measured on {plan.max_images} images of each dataset at most, to take "
            f"{format_duration(measuring_s)}"
        )
    return "\n".join(lines)


def describe_kept(plan: Plan, run_dir: Path) -> str:
    """Say that an earlier start has chosen."""
    path = run_dir / PLAN_FILE
    return f"{plan.steps} steps in {plan.precision}, as chosen before ({path})"
