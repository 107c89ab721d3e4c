"""Train: `main()` for a configuration, `EfficientResNet18Trainer` for your own loaders too."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training_framework.checkpoint import load_checkpoint, load_newest
from training_framework.config import TrainConfig, load_config
from training_framework.config.config import Config
from training_framework.config.inheritance import read_config_file
from training_framework.config.loading import config_to_dict, names_checkpoint
from training_framework.data.facts import DatasetFacts
from training_framework.errors import UserError
from training_framework.machine.hardware import Hardware
from training_framework.plan import TrainPlan, plan_run
from training_framework.runs.directory import run_directory_of
from training_framework.runs.progress import TrainResult
from training_framework.training.run import TrainingRun

__all__ = ["EfficientResNet18Trainer", "configure", "main", "plan_for"]


def configure(
    path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    source: str = "overrides",
) -> TrainConfig:
    """A configuration from a file and overrides; above a checkpoint's own where `resume` names one.

    Raises:
        UserError: A file, key or value is wrong.
    """
    resume = (overrides or {}).get("resume")
    if resume is None and path is not None and "resume" in (settings := read_config_file(path)):
        resume = settings["resume"].value
    base = None
    if names_checkpoint(resume):
        checkpoint = Path(str(resume))
        is_last = checkpoint.name == "last.ckpt" and run_directory_of(checkpoint) is not None
        state = load_newest(checkpoint)[0] if is_last else load_checkpoint(checkpoint)
        base = state["config"]
    return load_config(path, overrides, base=base, source=source)


def plan_for(config: TrainConfig) -> tuple[TrainPlan, Hardware, DatasetFacts]:
    """What `config` would run here: the plan, and the facts it rests on. Trains nothing.

    Raises:
        UserError: Something that is asked for is wrong or cannot be done here.
    """
    planned = plan_run(config)
    return planned.plan, planned.hardware, planned.facts


def main(
    config: TrainConfig | type[Config] | str | Path | None = None, **overrides: Any
) -> TrainResult:
    """Train as configured, and return what was reached.

    Args:
        config: A TrainConfig, `Config` or a subclass, a YAML file or the name of a shipped one;
            without it, ResNet-18 on the embedded digits.
        **overrides: Settings that win over the configuration's: `main(epochs=3)`.

    Raises:
        UserError: Something that is asked for is wrong or cannot be done here.
    """
    return EfficientResNet18Trainer(config, **overrides).train()


class EfficientResNet18Trainer:
    """Trains a network on the configured data or on your own DataLoaders.

    Args:
        config: As for `main`. Its `model` is trained: ResNet-18 unless it says otherwise.
        network: Your own network instead of the configured `model`, from (N, 3, H, W) float
            images to (N, classes) scores.
        **overrides: Settings that win over the configuration's.

    Attributes:
        config: The validated, frozen configuration.
        model: The trained network; None before `train`.
        plan: What was decided for the run; None before `train`.
    """

    def __init__(
        self,
        config: TrainConfig | type[Config] | str | Path | None = None,
        *,
        network: nn.Module | None = None,
        **overrides: Any,
    ) -> None:
        self.config = _as_train_config(config, overrides)
        self.model = network
        self.plan: TrainPlan | None = None

    def train(
        self,
        train_loader: Iterable[Any] | None = None,
        val_loader: Iterable[Any] | None = None,
    ) -> TrainResult:
        """Train to the end.

        Args:
            train_loader: Any sized iterable of (float images (N, 3, H, W), int labels (N,)), such
                as a torch DataLoader, instead of the configured data.
            val_loader: Likewise, for evaluation; without it nothing is evaluated.

        Raises:
            UserError: Something that is asked for is wrong or cannot be done here.
        """
        if train_loader is None and val_loader is not None:
            raise UserError("a val_loader is given without a train_loader", "give both")
        run = TrainingRun(
            self.config, model=self.model, train_loader=train_loader, val_loader=val_loader
        )
        result = run.execute()
        self.model, self.plan = run.model, run.plan
        return result

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Tensor:
        """Class probabilities, (N, classes) on the CPU, of prepared images (N, 3, H, W) float.

        Raises:
            UserError: Nothing has been trained yet.
        """
        if self.model is None:
            raise UserError("there is no trained network yet", "call train() first")
        self.model.eval()
        device = next(self.model.parameters()).device
        return self.model(images.to(device)).float().softmax(dim=1).cpu()


def _as_train_config(
    config: TrainConfig | type[Config] | str | Path | None, overrides: dict[str, Any]
) -> TrainConfig:
    if isinstance(config, type) and issubclass(config, Config):
        config = config.to_train_config()
    if isinstance(config, TrainConfig):
        if not overrides:
            return config
        return load_config(overrides=overrides, base=config_to_dict(config))
    if config is None or isinstance(config, (str, Path)):
        return configure(config, overrides)
    raise UserError(
        f"config is a {type(config).__name__}",
        "give a TrainConfig, Config, a YAML file's name, or nothing",
    )
