"""Training from Python: `main()`, and `EfficientResNet18Trainer` for your own loaders."""

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
from training_framework.data.user_look import LookedAtLoader, look_at
from training_framework.errors import UserError
from training_framework.machine.hardware import Hardware
from training_framework.plan import TrainPlan, plan_run
from training_framework.runs.directory import run_directory_of
from training_framework.runs.progress import TrainResult
from training_framework.training.run import TrainingRun
from training_framework.training.user_network import check_is_network, try_user_network

__all__ = ["EfficientResNet18Trainer", "configure", "main", "plan_for"]


def configure(
    path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    source: str = "overrides",
) -> TrainConfig:
    """A configuration from a file and overrides.

    Where `resume` names a checkpoint, its configuration gives the settings that neither sets.

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
    """Plan what `config` would run here, without training.

    Returns:
        The plan, and the hardware and data set that it is based on.

    Raises:
        UserError: A setting is wrong or cannot be used on this machine.
    """
    planned = plan_run(config)
    return planned.plan, planned.hardware, planned.facts


def main(
    config: TrainConfig | type[Config] | str | Path | None = None, **overrides: Any
) -> TrainResult:
    """Train as configured, and return the result.

    Args:
        config: A TrainConfig, `Config` or a subclass, a YAML file or the name of a shipped one.
            None trains ResNet-18 on the embedded digits.
        **overrides: Settings that replace those of the configuration: `main(epochs=3)`.

    Raises:
        UserError: A setting is wrong or cannot be used on this machine.
    """
    return EfficientResNet18Trainer(config, **overrides).train()


class EfficientResNet18Trainer:
    """Trains a network on the configured data or on your own DataLoaders.

    Args:
        config: As for `main`. Its `model` is trained; the default is ResNet-18.
        network: Your own network instead of the configured `model`, from (N, 3, H, W) float
            images to (N, classes) scores, with fp32 weights on any device. It is trained in place.
        **overrides: Settings that replace those of the configuration.

    Attributes:
        config: The validated, frozen configuration.
        model: The trained network (with `ema_decay`, the weight average). It contains only torch's
            own operators, so torch.export, torch.jit.trace and torch.onnx accept it. Before
            `train` it is your own network, or None.
        plan: The plan of the run; None before `train`.
    """

    def __init__(
        self,
        config: TrainConfig | type[Config] | str | Path | None = None,
        *,
        network: nn.Module | None = None,
        **overrides: Any,
    ) -> None:
        self.config = _as_train_config(config, overrides)
        if network is not None:
            check_is_network(network)
            if self.config.weights is not None:
                raise UserError(
                    f"weights is {self.config.weights}, but network is your own",
                    "load them with network.load_state_dict and remove weights",
                )
        self._network = network
        self.model = network
        self.plan: TrainPlan | None = None

    def train(
        self,
        train_loader: Iterable[Any] | None = None,
        val_loader: Iterable[Any] | None = None,
    ) -> TrainResult:
        """Train to the end.

        Each call starts a new learning-rate schedule and run directory. A further call trains a
        configured model anew from the seed, and continues to train a `network` of your own.

        Args:
            train_loader: Any iterable with a length, such as a torch DataLoader, instead of the
                configured data. It yields (images, labels, ...) or a dict with one of the keys
                images, image, imgs, img, pixel_values, inputs, input and x, and one of labels,
                label, targets, target and y: tensors or NumPy arrays, images (N, 3, H, W) of any
                float type or uint8 (divided by 255), and integer labels (N,) or (N, 1). One batch
                is checked before training starts, and is then trained on like the others.
            val_loader: The same, for evaluation. None: the network is not evaluated.

        Raises:
            UserError: A setting is wrong or cannot be used on this machine.
        """
        if train_loader is None and val_loader is not None:
            raise UserError("val_loader is given without train_loader", "give both")
        looked = self._looked_at(train_loader, "training")
        looked_val = self._looked_at(val_loader, "validation")
        run = TrainingRun(
            self.config, model=self._network, train_loader=looked, val_loader=looked_val
        )
        if self._network is not None:
            size = run.plan.image_size
            try_user_network(
                self._network,
                torch.zeros(2, 3, size, size) if looked is None else looked.images,
                num_classes=run.plan.num_classes,
                seed=self.config.seed,
                will_be_copied=run.plan.averages_weights,
            )
        result = run.execute()
        self.model, self.plan = run.model, run.plan
        return result

    def _looked_at(self, loader: Iterable[Any] | None, role: str) -> LookedAtLoader | None:
        if loader is None:
            return None
        interval = self.config.val_check_interval
        evaluates_once = isinstance(interval, float) and interval >= 1
        several = self.config.epochs > 1 or (role == "validation" and not evaluates_once)
        return look_at(loader, role=role, seed=self.config.seed, several_passes=several)

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Tensor:
        """Class probabilities (N, classes), on the CPU, of prepared float images (N, 3, H, W).

        Raises:
            UserError: Nothing has been trained yet.
        """
        if self.model is None:
            raise UserError("predict() needs a trained network", "call train() first")
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
        "pass a TrainConfig, Config, the name of a YAML file, or nothing",
    )
