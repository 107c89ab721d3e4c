"""An experiment is data: a YAML list of named variants, each with the settings that it changes."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from training_framework.config import TrainConfig
from training_framework.config.inheritance import (
    Setting,
    canonical_settings,
    parse_yaml,
    read_config_file,
    read_yaml_text,
)
from training_framework.config.loading import build_config
from training_framework.config.names import nearest
from training_framework.errors import UserError, shown
from training_framework.measure.compare.statistics import FEWEST_PAIRS
from training_framework.measure.compare.variant_environment import refused_variable

__all__ = ["CONTROL", "Experiment", "Variant", "load_experiment", "shipped_experiments"]

CONTROL = "A/A control"

Name = Annotated[str, Field(min_length=1, max_length=48, pattern=r"^[^|\n]+$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Variant(_Strict):
    """One set of settings to measure.

    Attributes:
        name: Shown in tables.
        overrides: Settings that override the base's.
        environment: Environment variables of its process.
        needs: What the machine must have: `gpu`, or `bf16` with instructions for it.
        against: The variant to compare with; None: the experiment's baseline.
    """

    name: Name
    overrides: dict[str, Any] = {}
    environment: dict[str, str] = {}
    needs: Annotated[tuple[Literal["gpu", "bf16"], ...], Field(strict=False)] = ()
    against: str | None = None


class Experiment(_Strict):
    """What is compared, and how it is measured.

    Attributes:
        name: The result file's name starts with it.
        description: What the experiment shows, for people.
        base: Settings that all variants share; in YAML also `extends`.
        variants: In the order of the table.
        baseline: Name of the variant that the others are compared with; None: the first one.
        measure: `steps` times optimizer steps; `epoch` times the epochs of whole runs; `accuracy`
            times whole runs to a target accuracy, or to their end without one.
        rounds: Samples of each variant. From 6 on, intervals can cover 95%; with an even number,
            both orders of the turns occur equally often.
        steps: Timed steps in a sample; None: as many as fit into `seconds`.
        seconds: Length of a sample if `steps` is not given.
        warmup_steps: Steps that are dropped before the first sample.
        seeds: Seeds for the rounds of `epoch` and `accuracy`; after the last, the first one is used
            again. Empty: the base's seed and the numbers after it.
        target_accuracy: Top-1 accuracy in percent at which `accuracy` stops the clock; `equal`: the
            best accuracy of the least accurate variant with the same seed.
        rounds_per_process: Restart all variants after this many rounds; None: after each round of
            whole runs, and for steps such that each variant gets 6 processes (never if `isolation`
            is `shared`). The memory addresses that a process happens to get can change its speed by
            a few percent for as long as it runs. So the interval is computed over processes, not
            over rounds (Mytkowicz et al., Producing Wrong Data Without Doing Anything Obviously
            Wrong, ASPLOS 2009).
        patience: Time that may be spent on waiting for a quiet machine and on repeating samples
            because it was not quiet, as a multiple of the time of the samples that count; 0: none.
        isolation: `process` gives each variant a process of its own; `shared` takes turns in one.
        control: Whether the baseline runs a second time, as a control.
        may_differ: Kinds of work in which variants may differ: `images_per_step`, `flops` (of an
            image), `image_size`, `dataset`.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=60)]
    description: str = ""
    base: dict[str, Any] = {}
    variants: Annotated[tuple[Variant, ...], Field(min_length=1, strict=False)]
    baseline: str | None = None
    measure: Literal["steps", "epoch", "accuracy"] = "steps"
    rounds: Annotated[int, Field(ge=1)] = 12
    steps: Annotated[int, Field(ge=1)] | None = None
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3.0
    warmup_steps: Annotated[int, Field(ge=1)] = 5
    seeds: Annotated[tuple[int, ...], Field(strict=False)] = ()
    target_accuracy: Annotated[float, Field(gt=0, le=100)] | Literal["equal"] | None = None
    rounds_per_process: Annotated[int, Field(ge=1)] | None = None
    patience: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    isolation: Literal["process", "shared"] = "process"
    control: bool = True
    may_differ: Annotated[
        tuple[Literal["images_per_step", "flops", "image_size", "dataset"], ...],
        Field(strict=False),
    ] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [variant.name for variant in self.variants]
        for variant in self.variants:
            if names.count(variant.name) > 1 or variant.name == CONTROL:
                raise ValueError(f"variants: the name {variant.name!r} is taken; rename one")
            if variant.against is not None and variant.against not in names:
                raise ValueError(
                    f"variants: {variant.name}: against: no variant is called "
                    f"{variant.against!r}; {nearest(variant.against, names)}"
                )
            refused = refused_variable(variant.environment)
            if refused is not None:
                raise ValueError(
                    f"variants: {variant.name}: environment: {refused} could load code; set it for "
                    "the whole command, outside the file"
                )
            if variant.environment and self.isolation == "shared":
                raise ValueError(
                    f"variants: {variant.name}: environment needs a process of its own, but "
                    "isolation is shared; set isolation to process"
                )
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(
                f"baseline: no variant is called {self.baseline!r}; {nearest(self.baseline, names)}"
            )
        if self.target_accuracy is not None and self.measure != "accuracy":
            raise ValueError(
                f"target_accuracy is given but measure is {self.measure}; set measure to accuracy"
            )
        return self

    @property
    def rounds_until_restart(self) -> int:
        """Rounds between two starts of the variants; all rounds if they start only once."""
        if self.rounds_per_process is not None:
            return self.rounds_per_process
        if self.isolation == "shared":
            return self.rounds
        return 1 if self.measure != "steps" else max(1, self.rounds // FEWEST_PAIRS)

    @property
    def baseline_variant(self) -> Variant:
        """The variant that the others are compared with."""
        wanted = self.baseline or self.variants[0].name
        return next(variant for variant in self.variants if variant.name == wanted)

    def reference_of(self, variant: Variant) -> str:
        """Name of the variant that this one is compared with; empty for the baseline."""
        if variant.against is not None:
            return variant.against
        baseline = self.baseline_variant.name
        return "" if variant.name == baseline else baseline

    def all_variants(self) -> tuple[Variant, ...]:
        """The variants and, last, the control.

        The longer the time between two turns, the more the machine's speed may drift. The control
        is at least as far from the baseline as any variant, so it shows at least as much drift.
        """
        if not self.control:
            return self.variants
        control = self.baseline_variant.model_copy(update={"name": CONTROL, "against": None})
        return (*self.variants, control)

    def config_of(self, variant: Variant, source: str = "experiment") -> TrainConfig:
        """The variant's whole configuration.

        Args:
            variant: One of this experiment's.
            source: Name of the file in error messages.

        Raises:
            UserError: A setting is unknown, wrong or contradicts another one.
        """
        settings = canonical_settings(self.base, f"{source}: base")
        where = f"{source}: variants: {variant.name}: overrides"
        settings.update(canonical_settings(variant.overrides, where))
        for key in ("resume", "stop_after_steps"):
            if key in settings and settings[key].value is not None:
                raise UserError(
                    f"{settings[key].source}: an experiment cannot use {key}", f"remove {key}"
                )
        return build_config(settings)


def shipped_experiments() -> dict[str, Path]:
    """Experiments that come with the package, by name."""
    root = Path(str(resources.files("training_framework.measure.compare")))
    return {file.stem: file for file in sorted((root / "experiments").glob("*.yaml"))}


def load_experiment(
    path: str | Path, settings: Mapping[str, Any] | None = None, **changes: Any
) -> Experiment:
    """Read an experiment.

    Args:
        path: A YAML file, or the name of a shipped experiment.
        settings: Settings that override the file's base, but not the variants' overrides.
        **changes: Fields of the experiment that override the file's, such as rounds=4.

    Raises:
        UserError: The file is missing or wrong; the error names the file and the key.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        shipped = shipped_experiments()
        if str(path) not in shipped:
            raise UserError(
                f"{path}: no such experiment",
                f"name a YAML file, or one of the included experiments: {', '.join(shipped)}",
            )
        file = shipped[str(path)]
    content = _parse(file)
    base = _base_settings(content.get("base", {}), file)
    base.update(canonical_settings(settings or {}, "command line"))
    fields = {"name": file.stem.lower(), **content, **changes}
    return make_experiment(fields, base, source=str(file))


def make_experiment(
    fields: Mapping[str, Any], base: Mapping[str, Setting], *, source: str
) -> Experiment:
    """Validate an experiment and each of its configurations.

    Args:
        fields: Fields of `Experiment`, without `base`.
        base: Settings that all variants share, each with its source.
        source: Name of the experiment in error messages.

    Raises:
        UserError: A key or value is wrong.
    """
    build_config(base)
    plain = {key: setting.value for key, setting in base.items()}
    try:
        experiment = Experiment(**{**fields, "base": plain})
    except ValidationError as error:
        raise _user_error(error, source) from None
    for variant in experiment.variants:
        experiment.config_of(variant, source)
    return experiment


def _parse(file: Path) -> dict[str, Any]:
    text = read_yaml_text(file)
    try:
        content = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{file}: not valid YAML{where}: {problem}", "fix that line") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(
            f"{file}: not an experiment", "write an experiment: name, base and variants"
        )
    return content


def _base_settings(content: Any, file: Path) -> dict[str, Setting]:
    """The settings of `base`, and of the files that its `extends` names."""
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(
            f"{file}: base: {shown(content)} is not a set of settings",
            "write `key: value` lines below base",
        )
    own = dict(content)
    extends = own.pop("extends", [])
    settings: dict[str, Setting] = {}
    for name in [extends] if isinstance(extends, str) else extends:
        beside = file.parent / str(name)
        settings.update(read_config_file(beside if beside.is_file() else str(name)))
    settings.update(canonical_settings(own, f"{file}: base"))
    return settings


def _user_error(error: ValidationError, source: str) -> UserError:
    first = error.errors()[0]
    if not first["loc"]:
        fault, _, cure = first["msg"].removeprefix("Value error, ").partition("; ")
        return UserError(f"{source}: {fault}", cure)
    key = ": ".join(str(part) for part in first["loc"])
    last = str(first["loc"][-1])
    if first["type"] == "extra_forbidden":
        fields = Variant.model_fields if first["loc"][0] == "variants" else Experiment.model_fields
        return UserError(f"{source}: unknown key {key!r}", nearest(last, fields))
    if first["type"] == "missing":
        return UserError(f"{source}: {key} is missing", f"add {last}")
    message = first["msg"].removeprefix("Input should be ").removeprefix("String should ")
    return UserError(
        f"{source}: {key}: {shown(first['input'])} should be {message}",
        "see docs/results.md",
    )
