"""Switches for what is trained and how: memory for time, weights, gradients, labels."""

from collections.abc import Iterator

from torch import nn

from training_framework.config.architectures import MODELS
from training_framework.models import checkpoint_activations
from training_framework.switches.device_memory import choose_micro_batching
from training_framework.switches.switch import (
    Card,
    Network,
    Situation,
    Switch,
    Trial,
    as_asked,
    off_and_on,
)

__all__ = ["METHODS"]

SMALLEST_TRIED_BATCH = 8


def _checkpoint_activations(model: nn.Module, network: Network) -> None:
    checkpoint_activations(model)


ACTIVATION_CHECKPOINTING = Switch(
    key="activation_checkpointing",
    name="checkpointing",
    numbers="rounding",
    choose=as_asked("activation_checkpointing"),
    change_network=_checkpoint_activations,
    ablation=off_and_on("activation_checkpointing"),
    card=Card(
        use="The device's memory is too small for the batch.",
        price="About one more forward pass a step: a third more work.",
        failure="A network without this framework's residual blocks has nothing to recompute.",
        source="Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174",
    ),
)

AUTO_MICRO_BATCH = Switch(
    key="auto_micro_batch",
    name="automatic micro-batches",
    numbers="different",
    choose=choose_micro_batching,
    card=Card(
        use="A run must not end when memory is full: the batch is computed in smaller parts. The "
        "plan turns it on where a GPU's memory seems too small.",
        price="Then the passes are smaller and slower, and batch norm sees the parts.",
        failure="It only works with one process: one that is short of memory cannot change what "
        "the others compute.",
        source="MosaicML Composer documentation, Automatic Microbatching",
    ),
)


def _accumulation_trials(situation: Situation) -> Iterator[Trial]:
    """The same images for each step, in fewer or more batches."""
    config = situation.config
    images_per_step = config.batch_size * config.accumulate_grad_batches
    for accumulate in (1, 2, 4, 8):
        batch, rest = divmod(images_per_step, accumulate)
        fits = SMALLEST_TRIED_BATCH <= batch <= situation.facts.train_images
        if not rest and fits and accumulate != config.accumulate_grad_batches:
            name = f"batch {batch}" + (f" x {accumulate}" if accumulate > 1 else "")
            yield Trial(name, {"batch_size": batch, "accumulate_grad_batches": accumulate})


ACCUMULATE_GRAD_BATCHES = Switch(
    key="accumulate_grad_batches",
    name="gradient accumulation",
    numbers="different",
    choose=as_asked("accumulate_grad_batches"),
    dimension="batch",
    trials=_accumulation_trials,
    card=Card(
        use="A step needs more images than fit in memory at once.",
        price="Smaller passes are slower for each image.",
        failure="Batch norm sees the small batches, not the whole of a step.",
        source="Ott et al., Scaling Neural Machine Translation, arXiv 1806.00187",
    ),
)

SHARE_EARLY_WEIGHTS = Switch(
    key="share_early_weights",
    name="shared weights",
    numbers="different",
    choose=as_asked("share_early_weights"),
    ablation=off_and_on("share_early_weights"),
    can_matter=lambda config, facts: MODELS[config.model].block == "basic",
    card=Card(
        use="A smaller file: in each block of the first stage, both convolutions share one weight.",
        price="A little accuracy. The speed stays the same.",
        failure="Bottleneck blocks have no two convolutions of the same shape, so the "
        "configuration refuses it.",
        source="Köpüklü et al., Convolutional Neural Networks with Layer Reuse, arXiv 1901.09615",
    ),
)

ZERO_INIT_LAST_NORM = Switch(
    key="zero_init_last_norm",
    name="zero-initialized last norms",
    numbers="different",
    choose=as_asked("zero_init_last_norm"),
    card=Card(
        use="Deep networks and large batches: every block starts as the identity.",
        price="None.",
        failure="It does not change loaded weights. In wrn a relu follows the last norm and would "
        "stay at zero, so the configuration refuses it.",
        source="Goyal et al., arXiv 1706.02677, section 5.1",
    ),
)

GRAD_CLIP_VAL = Switch(
    key="grad_clip_val",
    name="gradient clipping",
    numbers="different",
    choose=as_asked("grad_clip_val"),
    card=Card(
        use="Single batches with very large gradients throw the training off.",
        price="One pass over all gradients each step.",
        failure="A limit below the usual norm is a lower learning rate in disguise.",
        source="Pascanu et al., arXiv 1211.5063",
    ),
)

LABEL_SMOOTHING = Switch(
    key="label_smoothing",
    name="label smoothing",
    numbers="different",
    choose=as_asked("label_smoothing"),
    card=Card(
        use="Training to convergence on many classes: the network becomes less sure of itself.",
        price="None. The training loss no longer falls to zero.",
        failure="Short trainings, which do not fit their data yet, become worse.",
        source="Szegedy et al., arXiv 1512.00567, section 7",
    ),
)

EMA_DECAY = Switch(
    key="ema_decay",
    name="weight average",
    numbers="different",
    choose=as_asked("ema_decay"),
    card=Card(
        use="Evaluation at a high learning rate, and a somewhat better network at the end.",
        price="A second copy of the weights, and one pass over them each step.",
        failure="With a decay near 1 a short run averages weights from its very start.",
        source="Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992",
    ),
)

METHODS = (
    SHARE_EARLY_WEIGHTS,
    ZERO_INIT_LAST_NORM,
    ACTIVATION_CHECKPOINTING,
    AUTO_MICRO_BATCH,
    ACCUMULATE_GRAD_BATCHES,
    GRAD_CLIP_VAL,
    LABEL_SMOOTHING,
    EMA_DECAY,
)
