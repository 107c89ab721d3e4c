"""A network with what it takes to use it: how it is built, how its input is prepared."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from training_framework.checkpoint import load_checkpoint
from training_framework.errors import UserError
from training_framework.models import ResNet, build_model, load_weights, read_metadata

__all__ = ["NetworkCard", "load_network"]

_METADATA_KEY = "network"


@dataclass(frozen=True, kw_only=True)
class NetworkCard:
    """What must be known to build a network again and to feed it.

    Attributes:
        model: A key of MODELS.
        stem: `cifar` or `imagenet`.
        share_early_weights: As in `build_model`.
        class_names: One a class, in label order.
        image_size: Side in pixels of the images it was trained on.
        mean: Per-channel mean of its input, in units where 255 is 1.
        std: Per-channel standard deviation, same units.
        center_crop: Whether evaluation images are the middle of a picture resized to 256/224 of
            `image_size`, as for image folders, or else the whole of it.
    """

    model: str
    stem: str
    share_early_weights: bool
    class_names: tuple[str, ...]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    center_crop: bool

    def build(self) -> ResNet:
        """The network, with initial weights.

        Raises:
            UserError: There is no such network.
        """
        return build_model(
            self.model,
            num_classes=len(self.class_names),
            stem=self.stem,  # type: ignore[arg-type]
            share_early_weights=self.share_early_weights,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    def as_metadata(self) -> dict[str, str]:
        """Text for the header of a safetensors file."""
        return {_METADATA_KEY: json.dumps(self.as_dict())}

    @classmethod
    def from_dict(cls, values: Any, path: Path) -> "NetworkCard":
        """The card in a file.

        Raises:
            UserError: It is missing or incomplete.
        """
        try:
            plain = dict(values)
            for key in ("class_names", "mean", "std"):
                plain[key] = tuple(plain[key])
            return cls(**plain)
        except (TypeError, KeyError, ValueError):
            raise UserError(
                f"{path}: does not say which network it belongs to",
                "use a checkpoint or weights.safetensors that this framework wrote",
            ) from None

    @classmethod
    def from_json(cls, text: str, path: Path) -> "NetworkCard":
        """As `from_dict`, from the header of a safetensors file."""
        try:
            values = json.loads(text)
        except ValueError:
            values = None
        return cls.from_dict(values, path)


def load_network(path: Path) -> tuple[nn.Module, NetworkCard]:
    """The network in a checkpoint or in a `weights.safetensors` of this framework, on the CPU.

    Of a checkpoint with a weight average it is the average, which is what was evaluated.

    Raises:
        UserError: The file is missing, damaged or of another kind.
    """
    if path.suffix == ".safetensors":
        text = read_metadata(path).get(_METADATA_KEY, "null")
        card = NetworkCard.from_json(text, path)
        network = _built(card, path)
        load_weights(network, path)
        return network.eval(), card
    state = load_checkpoint(path)
    card = NetworkCard.from_dict(state["network"], path)
    network = _built(card, path)
    try:
        network.load_state_dict(state["average"] or state["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{path}: its weights do not fit its {card.model} ({reason})", "take another checkpoint"
        ) from None
    return network.eval(), card


def _built(card: NetworkCard, path: Path) -> ResNet:
    try:
        return card.build()
    except UserError as error:
        raise UserError(f"{path}: {error.fault}", "take another checkpoint") from None
