"""Switches for what a network is made of, and for how its parts start and are trained."""

from collections.abc import Callable

from training_framework.config.schema import as_in_model
from training_framework.errors import UserError
from training_framework.models.norms import freeze_norm_scales, set_norm_momentum
from training_framework.models.whitening import freeze_first_convolution
from training_framework.switches.switch import Card, Decision, Situation, Switch

__all__ = ["NETWORKS"]


def _as_in_model(key: str) -> Callable[[Situation], Decision]:
    """The choice of what the model has by itself, unless the configuration says otherwise."""

    def choose(situation: Situation) -> Decision:
        wanted = getattr(situation.config, key)
        if situation.own_network and key not in _CHANGES and wanted not in ("auto", _PLAIN[key]):
            raise UserError(
                f"{key} is {str(wanted).lower()}, but network is your own and is not rebuilt",
                f"remove {key}, or build it into your network",
            )
        if situation.own_network and (wanted == "auto" or key not in _CHANGES):
            return Decision(_PLAIN[key])
        value = as_in_model(situation.config, key)
        own = wanted == "auto" and value not in (False, None, "relu")
        return Decision(value, f"a part of {situation.config.model}" if own else "")

    return choose


# What can change in a user's own network too; all else goes into the building of a model.
_CHANGES = frozenset({"whitening", "freeze_norm_scales", "norm_momentum"})
# Values that leave a network as it is.
_PLAIN = {
    **dict.fromkeys(("squeeze_excitation", "blur_pool", "deep_stem", "pooled_shortcut"), False),
    **dict.fromkeys(("dirac_init", "whitening", "freeze_norm_scales"), False),
    "activation": "relu",
    "norm_momentum": None,
}

ACTIVATION = Switch(
    key="activation",
    name="activation",
    numbers="different",
    choose=_as_in_model("activation"),
    card=Card(
        use="GELU, SiLU and Mish are smooth; short trainings of small networks are published with "
        "GELU.",
        price="GELU and SiLU compute an exponential for each number; Mish is not fused with norms. "
        "Not yet measured.",
        failure="Loaded weights were trained with one activation, and need the same.",
        source="Hendrycks and Gimpel, arXiv 1606.08415; Ramachandran et al., arXiv 1710.05941; "
        "Misra, arXiv 1908.08681",
    ),
)

SQUEEZE_EXCITATION = Switch(
    key="squeeze_excitation",
    name="squeeze and excitation",
    numbers="different",
    choose=_as_in_model("squeeze_excitation"),
    card=Card(
        use="Trainings to convergence of large networks, whose channels it weighs by the image.",
        price="Two passes over each block's output, and about a tenth more weights. Not yet "
        "measured.",
        failure="Last norms and additions cannot be fused around it.",
        source="Hu et al., Squeeze-and-Excitation Networks, arXiv 1709.01507",
    ),
)

BLUR_POOL = Switch(
    key="blur_pool",
    name="blur pool",
    numbers="different",
    choose=_as_in_model("blur_pool"),
    card=Card(
        use="Large images: predictions depend less on shifts by a pixel.",
        price="Convolutions that reduced the maps compute four times as many pixels. Not yet "
        "measured.",
        failure="Small images with the cifar stem have few reductions to blur.",
        source="Zhang, Making Convolutional Networks Shift-Invariant Again, arXiv 1904.11486",
    ),
)

DEEP_STEM = Switch(
    key="deep_stem",
    name="deep stem",
    numbers="different",
    choose=_as_in_model("deep_stem"),
    card=Card(
        use="Large images (ResNet-C): three 3x3 convolutions see the first pixels.",
        price="With the imagenet stem, about twice the work of the first convolution. Not yet "
        "measured.",
        failure="With the cifar stem, two more convolutions run on the largest maps.",
        source="He et al., Bag of Tricks for Image Classification, arXiv 1812.01187, section 4.2",
    ),
)

POOLED_SHORTCUT = Switch(
    key="pooled_shortcut",
    name="pooled shortcuts",
    numbers="different",
    choose=_as_in_model("pooled_shortcut"),
    card=Card(
        use="With the deep stem it makes ResNet-D: a projection sees all pixels, not a quarter.",
        price="One average of each stage's input. Not yet measured.",
        failure="Networks without projections have nothing to change.",
        source="He et al., Bag of Tricks for Image Classification, arXiv 1812.01187, section 4.2",
    ),
)


def _whitening(situation: Situation) -> Decision:
    decision = _as_in_model("whitening")(situation)
    if decision.value and situation.facts.storage == "loader":
        return Decision(False, "the images of a loader are not read before the training")
    return decision


WHITENING = Switch(
    key="whitening",
    name="whitening",
    numbers="different",
    choose=_whitening,
    change_network=lambda model, network: freeze_first_convolution(model),
    card=Card(
        use="Short trainings: the first filters need not be learned.",
        price="2,000 images are read before the first step. Not yet measured.",
        failure="It needs a single first convolution. Loaded weights keep their filters, which are "
        "then not trained.",
        source="Page, How to Train Your ResNet 8 (2019); K. Jordan, arXiv 2404.00498, section 3.1",
    ),
)

DIRAC_INIT = Switch(
    key="dirac_init",
    name="identity convolutions",
    numbers="different",
    choose=_as_in_model("dirac_init"),
    card=Card(
        use="Short trainings: each layer starts by passing its input on.",
        price="None. Not yet measured.",
        failure="It does not change loaded weights. In blocks whose shortcut passes the input on "
        "already, the input counts twice.",
        source="Zagoruyko and Komodakis, DiracNets, arXiv 1706.00388; K. Jordan, arXiv 2404.00498",
    ),
)

NORM_MOMENTUM = Switch(
    key="norm_momentum",
    name="batch norm's momentum",
    numbers="different",
    choose=_as_in_model("norm_momentum"),
    change_network=lambda model, network: set_norm_momentum(model, network.chosen["norm_momentum"]),
    card=Card(
        use="Large for trainings of some hundred steps, small for small batches.",
        price="None. Not yet measured.",
        failure="Evaluation uses the averages: too small a value leaves them behind the weights, "
        "too large a one makes them noisy.",
        source="Ioffe and Szegedy, arXiv 1502.03167; K. Jordan, arXiv 2404.00498",
    ),
)

FREEZE_NORM_SCALES = Switch(
    key="freeze_norm_scales",
    name="fixed norm scales",
    numbers="different",
    choose=_as_in_model("freeze_norm_scales"),
    change_network=lambda model, network: freeze_norm_scales(model),
    card=Card(
        use="Short trainings with a high learning rate for biases, at which the scales would "
        "diverge.",
        price="None. Not yet measured.",
        failure="With zero_init_last_norm the branches would stay zero, so the configuration "
        "refuses it.",
        source="K. Jordan, arXiv 2404.00498",
    ),
)

NETWORKS = (
    ACTIVATION,
    SQUEEZE_EXCITATION,
    BLUR_POOL,
    DEEP_STEM,
    POOLED_SHORTCUT,
    WHITENING,
    DIRAC_INIT,
    NORM_MOMENTUM,
    FREEZE_NORM_SCALES,
)
