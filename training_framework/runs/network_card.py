"""What it takes to use a trained network: how it is built, and how its input is prepared."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import nn

from training_framework.checkpoint import load_checkpoint
from training_framework.config.architectures import Variation
from training_framework.data.facts import DatasetFacts
from training_framework.errors import UserError
from training_framework.models import build_model, load_weights, read_metadata
from training_framework.plan import TrainPlan

__all__ = ["NetworkCard", "load_network"]

MAX_CLASSES = 100_000
LARGEST_IMAGE_SIZE = 4096
_METADATA_KEY = "network"
_VARIATION = TypeAdapter(Variation)


@dataclass(frozen=True, kw_only=True)
class NetworkCard:
    """What must be known to build a network again and to feed it.

    Attributes:
        model: A key of MODELS, or the class of a user's own network.
        stem: `cifar` or `imagenet`.
        share_early_weights: As in `build_model`.
        class_names: One for each class, in label order.
        image_size: Side in pixels of the images to evaluate it on.
        mean: Per-channel mean of its input, in units where 255 is 1.
        std: Per-channel standard deviation, same units.
        center_crop: Whether evaluation uses the middle of an image resized to 256/224 of
            `image_size`, as for image folders; otherwise it uses the whole image.
        is_own: Whether it is a user's own network; no file holds its class.
        variation: What settings changed in the model; None, in older files: nothing.
        array_size: Side in pixels of images held as arrays before they are resized to
            `image_size`; None, in older files: the same.
    """

    model: str
    stem: str
    share_early_weights: bool
    class_names: tuple[str, ...]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    center_crop: bool
    is_own: bool = False
    variation: Variation | None = None
    array_size: int | None = None

    @classmethod
    def of(cls, plan: TrainPlan, facts: DatasetFacts) -> "NetworkCard":
        """The card of a network that is trained as planned on a data set."""
        return cls(
            model=plan.own_network or plan.model,
            is_own=plan.own_network is not None,
            stem=plan.stem,
            share_early_weights=plan.share_early_weights,
            class_names=facts.class_names or tuple(map(str, range(plan.num_classes))),
            image_size=plan.eval_img_size,
            mean=facts.mean,
            std=facts.std,
            center_crop=facts.storage == "files",
            variation=plan.variation,
            array_size=plan.image_size,
        )

    def build(self) -> nn.Module:
        """The network, with initial weights.

        Raises:
            UserError: There is no such network, or it is a user's own.
        """
        if self.is_own:
            raise UserError(
                f"holds the weights of a user's own network ({self.model}), but not its class",
                f"in Python, build {self.model} and load weights.safetensors of its run into it "
                "(safetensors.torch.load_model)",
            )
        return build_model(
            self.model,
            num_classes=len(self.class_names),
            stem=self.stem,  # type: ignore[arg-type]
            share_early_weights=self.share_early_weights,
            variation=self.variation,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        plain = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }
        if self.variation is not None:
            plain["variation"] = self.variation._asdict()
        return plain

    def as_metadata(self) -> dict[str, str]:
        """Text for the header of a safetensors file."""
        return {_METADATA_KEY: json.dumps(self.as_dict())}

    @classmethod
    def from_dict(cls, values: Any, path: Path) -> "NetworkCard":
        """The card in a file.

        Raises:
            UserError: It is missing or incomplete, or its values make no sense.
        """
        card: NetworkCard | None = None
        try:
            plain = dict(values)
            for key in ("class_names", "mean", "std"):
                plain[key] = tuple(plain[key])
            if plain.get("variation") is not None:
                plain["variation"] = _VARIATION.validate_python(plain["variation"])
            card = cls(**plain)
        except (TypeError, KeyError, ValueError):
            pass
        if card is None or not card._makes_sense():
            raise UserError(
                f"{path}: does not say which network it belongs to",
                "use a checkpoint or weights.safetensors that this framework wrote",
            ) from None
        return card

    def _makes_sense(self) -> bool:
        """Whether all values have the right types and plausible sizes; a file may hold anything."""
        numbers = (*self.mean, *self.std)
        return (
            isinstance(self.model, str)
            and isinstance(self.stem, str)
            and isinstance(self.share_early_weights, bool)
            and isinstance(self.center_crop, bool)
            and isinstance(self.is_own, bool)
            and 1 <= len(self.class_names) <= MAX_CLASSES
            and all(isinstance(name, str) for name in self.class_names)
            and all(
                type(size) is int and 1 <= size <= LARGEST_IMAGE_SIZE
                for size in (self.image_size, self.array_size or self.image_size)
            )
            and len(self.mean) == len(self.std) == 3
            and all(type(number) in (int, float) for number in numbers)
            and all(-1e6 < number < 1e6 for number in numbers)  # NaN is in no interval
            and min(self.std) > 0
        )

    @classmethod
    def from_json(cls, text: str, path: Path) -> "NetworkCard":
        """As `from_dict`, from the header of a safetensors file."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            values = None
        return cls.from_dict(values, path)


def load_network(path: Path) -> tuple[nn.Module, NetworkCard]:
    """The network in a checkpoint or in a `weights.safetensors` of this framework, on the CPU.

    A checkpoint with a weight average gives the average, which is what was evaluated.

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


def _built(card: NetworkCard, path: Path) -> nn.Module:
    try:
        return card.build()
    except UserError as error:
        cure = error.cure if card.is_own else "take another checkpoint"
        raise UserError(f"{path}: {error.fault}", cure) from None
