"""Turn a loader's batch into the input of the network, on the device."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from training_framework.data import augmentation
from training_framework.data.appearance import Appearance
from training_framework.data.batch import Batch
from training_framework.data.draws import BatchDraws
from training_framework.data.resolution import Resolutions, resized

__all__ = ["EvalTransform", "FlipMode", "MixedLabels", "TrainTransform"]

FlipMode = Literal["none", "random", "alternating"]

# Rows of a batch's draws. Each augmentation has its own, so none changes the draws of the others.
_FLIP = 0
_CROP = slice(1, 3)
_CUTOUT = slice(3, 5)
_ERASING = slice(5, 10)
_APPEARANCE = slice(10, None)


class MixedLabels(NamedTuple):
    """Labels of mixed images: the loss is `lam * loss(labels) + (1 - lam) * loss(other)`.

    Attributes:
        labels: (N,) int64, the labels of the images themselves.
        other_labels: (N,) int64, the labels of their partners.
        lam: () float32 on the device, so that a step is compiled only once for all values.
    """

    labels: Tensor
    other_labels: Tensor
    lam: Tensor


class EvalTransform:
    """Normalizes uint8 images; only changes the memory format of float images.

    Args:
        mean: Per-channel mean, in units where 255 is 1.
        std: Per-channel standard deviation, same units.
        device: The device of the batches.
        dtype: Of the result for uint8 images.
        channels_last: Whether the result is channels_last in memory.
        size: Side in pixels to which uint8 images are resized; None: they keep their size.
    """

    def __init__(
        self,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
        size: int | None = None,
    ) -> None:
        self._size = size
        self._scale, self._shift = augmentation.scale_and_shift(mean, std, device)
        self._dtype = dtype
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._by_rows = channels_last and self._scale.device.type == "cpu"
        self._row_width = 0
        self._row_scale = self._row_shift = self._scale

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The batch's images, (N, C, H, W) float, and its labels, (N,) int64."""
        images = self.normalized(batch.images)
        if self._size is not None and not batch.images.is_floating_point():
            images = resized(images, self._size)
        return images, batch.labels

    def normalized(self, images: Tensor) -> Tensor:
        """(N, C, H, W) images as floats."""
        if images.is_floating_point():
            return images.contiguous(memory_format=self._memory_format)
        if self._by_rows:
            if images.shape[3] != self._row_width:
                self._row_width = images.shape[3]
                self._row_scale = self._scale.repeat(self._row_width)
                self._row_shift = self._shift.repeat(self._row_width)
            return augmentation.normalize_rows(
                images, self._row_scale, self._row_shift, dtype=self._dtype
            )
        return augmentation.normalize(
            images,
            self._scale,
            self._shift,
            dtype=self._dtype,
            memory_format=self._memory_format,
        )


class TrainTransform:
    """Augments and normalizes uint8 batches; float batches are only mixed.

    The float images of a user's own loader are already augmented: only their memory format changes,
    and mixup and cutmix apply if they are on.

    Args:
        mean: Per-channel mean, in units where 255 is 1.
        std: Per-channel standard deviation, same units.
        sample_count: Samples of the training split.
        seed: The run's seed.
        device: The device of the batches.
        flip: `random` mirrors half of the images, `alternating` mirrors each one every other epoch.
        crop_padding: Padding in pixels of pad-and-crop; 0: off.
        cutout: Side in pixels of the square that is cut out; 0: off.
        random_erasing: Probability of losing a rectangle; 0: off.
        appearance: Changes of colors and shapes; None: none.
        resolutions: Size of the result by epoch, for uint8 images; None: they keep theirs.
        mixup: Alpha of mixup's beta distribution; 0: off.
        cutmix: Alpha of cutmix's beta distribution; 0: off. With both, each step draws one of them.
        dtype: Of the result for uint8 images.
        channels_last: Whether the result is channels_last in memory.
    """

    def __init__(
        self,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        sample_count: int,
        seed: int,
        device: torch.device | str,
        flip: FlipMode = "none",
        crop_padding: int = 0,
        cutout: int = 0,
        random_erasing: float = 0.0,
        appearance: Appearance | None = None,
        resolutions: Resolutions | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
    ) -> None:
        self._flip = flip
        self._crop_padding = crop_padding
        self._cutout = cutout
        self._random_erasing = random_erasing
        self._appearance = appearance or Appearance()
        self._resolutions = resolutions
        self._mixup = mixup
        self._cutmix = cutmix
        self._to_floats = EvalTransform(
            mean=mean, std=std, device=device, dtype=dtype, channels_last=channels_last
        )
        self._draws_per_sample = max(
            _FLIP + 1 if flip == "random" else 0,
            _CROP.stop if crop_padding else 0,
            _CUTOUT.stop if cutout else 0,
            _ERASING.stop if random_erasing else 0,
            _APPEARANCE.start + changes if (changes := self._appearance.draws_per_sample) else 0,
        )
        self._draws = BatchDraws(
            seed=seed,
            sample_count=sample_count,
            draws_per_sample=self._draws_per_sample,
            device=device,
        )

    def __call__(
        self, batch: Batch, *, step: int, epoch: int
    ) -> tuple[Tensor, Tensor, MixedLabels | None]:
        """Augment one batch.

        Args:
            batch: A batch on the device.
            step: Optimizer steps (or micro-batches) before this one in the run; draws the mixing.
            epoch: Counted from 0; draws everything else, with the sample's index.

        Returns:
            (N, C, H, W) float images, (N,) int64 labels, and the mixed labels if images were mixed.
        """
        if batch.images.is_floating_point():
            images = self._to_floats.normalized(batch.images)
        else:
            images = self._augmented(batch, epoch)
        if not (self._mixup or self._cutmix):
            return images, batch.labels, None
        return self._mixed(images, batch.labels, step)

    def _augmented(self, batch: Batch, epoch: int) -> Tensor:
        images = batch.images
        if self._draws_per_sample:
            draws = self._draws.uniforms(batch.indices, epoch=epoch)
        if self._flip == "alternating":
            sides = self._draws.first_sides(batch.indices)
            images = augmentation.flip(images, augmentation.alternating_flip_flags(sides, epoch))
        elif self._flip == "random":
            images = augmentation.flip(images, draws[_FLIP] < 0.5)
        if self._crop_padding:
            offsets = (draws[_CROP] * (2 * self._crop_padding + 1)).long()
            images = augmentation.pad_and_crop(images, self._crop_padding, offsets[0], offsets[1])
        if self._appearance.draws_per_sample:
            images = self._appearance(images, draws[_APPEARANCE])
        images = self._to_floats.normalized(images)
        if self._cutout:
            height, width = images.shape[2:]
            row, column = draws[_CUTOUT]
            images = augmentation.cutout(
                images, self._cutout, (row * height).long(), (column * width).long()
            )
        if self._random_erasing:
            images = augmentation.random_erasing(
                images, draws[_ERASING], probability=self._random_erasing
            )
        if self._resolutions is not None:
            images = resized(images, self._resolutions.at(epoch))
        return images

    def _mixed(
        self, images: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Tensor, MixedLabels]:
        generator = self._draws.for_step(step)
        cuts = bool(self._cutmix) and (not self._mixup or generator.random() < 0.5)
        alpha = self._cutmix if cuts else self._mixup
        lam = float(generator.beta(alpha, alpha))
        if cuts:
            center_y, center_x = generator.random(2).tolist()
            images, lam = augmentation.cutmix(images, lam, center_y=center_y, center_x=center_x)
        else:
            images = augmentation.mixup(images, lam)
        # Filled on the device: torch.tensor would copy from the host and wait.
        lam_on_device = torch.full((), lam, device=images.device)
        return images, labels, MixedLabels(labels, labels.roll(1), lam_on_device)
