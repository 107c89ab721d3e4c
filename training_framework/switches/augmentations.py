"""Switches for the augmentation of training images."""

from collections.abc import Callable

from training_framework.errors import UserError
from training_framework.switches.switch import Card, Decision, Situation, Switch, as_asked

__all__ = ["AUGMENTATIONS"]


def _flip(situation: Situation) -> Decision:
    wanted, facts = situation.config.flip, situation.facts
    if facts.storage == "loader":
        return Decision("none")
    if wanted != "auto":
        return Decision(wanted)
    if facts.flip:
        return Decision("random", "mirrored images keep their class")
    return Decision("none", "a mirror changes the class")


def _of_pixels(key: str) -> Callable[[Situation], Decision]:
    """As asked; a user's own loader gives floats, which are not augmented."""

    def choose(situation: Situation) -> Decision:
        wanted = getattr(situation.config, key)
        if situation.facts.storage == "loader" and wanted not in (0, "none"):
            raise UserError(
                f"{key} is for data sets, and your own loader makes its images",
                f"remove {key}, or augment in your loader",
            )
        return Decision(wanted)

    return choose


FLIP = Switch(
    key="flip",
    name="mirrored images",
    numbers="different",
    choose=_flip,
    card=Card(
        use="Images that keep their class in a mirror: things and animals. `alternating` mirrors "
        "each image in every other epoch, which is better in short trainings.",
        price="One pass over the batch.",
        failure="Digits and writing change their class: auto does not mirror them.",
        source="K. Jordan, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU, arXiv 2404.00498",
    ),
)


def _crop_padding(situation: Situation) -> Decision:
    if situation.facts.storage == "loader":
        return Decision(0)
    wanted = situation.config.crop_padding
    return Decision(situation.facts.crop_padding if wanted == "auto" else wanted)


CROP_PADDING = Switch(
    key="crop_padding",
    name="random crop",
    numbers="different",
    choose=_crop_padding,
    card=Card(
        use="Sets held as arrays, whose objects fill the image: each is shifted by some pixels.",
        price="One pass over the batch.",
        failure="No effect on image files: they are cropped while they are decoded.",
        source="He et al., Deep Residual Learning, arXiv 1512.03385, section 4.2",
    ),
)

CUTOUT = Switch(
    key="cutout",
    name="cutout",
    numbers="different",
    choose=_of_pixels("cutout"),
    card=Card(
        use="Long trainings on small sets such as CIFAR, with a square of half the image's side.",
        price="One pass over the batch. The training accuracy is no longer that of whole images.",
        failure="Short trainings, and objects that the square can hide altogether.",
        source="DeVries and Taylor, arXiv 1708.04552",
    ),
)

RANDOM_ERASING = Switch(
    key="random_erasing",
    name="random erasing",
    numbers="different",
    choose=_of_pixels("random_erasing"),
    card=Card(
        use="As cutout, with rectangles of all sizes in a share of the images.",
        price="One pass over the batch.",
        failure="As cutout. With both, little of an image may be left.",
        source="Zhong et al., arXiv 1708.04896",
    ),
)

MIXUP = Switch(
    key="mixup",
    name="mixup",
    numbers="different",
    choose=as_asked("mixup"),
    card=Card(
        use="Long trainings of large networks: each image and its label are a mixture of two.",
        price="One pass over the batch. The training accuracy says little.",
        failure="Short trainings and small networks fit the mixtures badly.",
        source="Zhang et al., arXiv 1710.09412",
    ),
)

CUTMIX = Switch(
    key="cutmix",
    name="cutmix",
    numbers="different",
    choose=as_asked("cutmix"),
    card=Card(
        use="As mixup, where single objects matter: a rectangle comes from another image.",
        price="One pass over the batch. The training accuracy says little.",
        failure="As mixup. With both, each step draws one of them.",
        source="Yun et al., arXiv 1905.04899",
    ),
)

COLOR_JITTER = Switch(
    key="color_jitter",
    name="color jitter",
    numbers="different",
    choose=_of_pixels("color_jitter"),
    card=Card(
        use="Photographs whose light differs more than the training set shows.",
        price="A few passes over the batch on the device. Not yet measured in this project.",
        failure="Classes that differ by their color. Short trainings.",
        source="Krizhevsky et al., ImageNet Classification with Deep Convolutional Neural "
        "Networks, 2012, section 4.1; the operations are Pillow's ImageEnhance",
    ),
)

AUTO_AUGMENT = Switch(
    key="auto_augment",
    name="automatic augmentation",
    numbers="different",
    choose=_of_pixels("auto_augment"),
    card=Card(
        use="Long trainings: `trivial` applies one random operation of a random strength to each "
        "image, `rand` several of one strength.",
        price="On a GPU three passes over the batch for each operation, on a CPU one over the "
        "images that drew it. Not yet measured in this project.",
        failure="Short trainings. Strong operations change what digits and fine classes show.",
        source="Müller and Hutter, TrivialAugment, arXiv 2103.10158; Cubuk et al., RandAugment, "
        "arXiv 1909.13719",
    ),
)

AUGMENTATIONS = (
    FLIP,
    CROP_PADDING,
    CUTOUT,
    RANDOM_ERASING,
    COLOR_JITTER,
    AUTO_AUGMENT,
    MIXUP,
    CUTMIX,
)
