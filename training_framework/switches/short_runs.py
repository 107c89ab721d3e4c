"""Switches for short trainings: what is trained on when, and what is evaluated."""

from training_framework.data.resolution import Resolutions
from training_framework.errors import UserError
from training_framework.switches.switch import Card, Decision, Situation, Switch, as_asked

__all__ = ["SHORT_RUNS"]

_UNMEASURED = "Not yet measured in this project."


def _progressive_resolution(situation: Situation) -> Decision:
    config, facts = situation.config, situation.facts
    wanted = config.progressive_resolution
    if not wanted:
        return Decision(())
    if facts.storage == "loader":
        raise UserError(
            "progressive_resolution is for data sets; your own loader sets the size of its images",
            "remove progressive_resolution",
        )
    resolutions = Resolutions.of(wanted, config.epochs)
    epochs = resolutions.by_epoch(config.epochs)
    pixels = sum(length * size**2 for length, size in epochs)
    share = pixels / (sum(length for length, _ in epochs) * facts.image_size**2)
    ends = [*(first for first, _ in resolutions.sizes[1:]), len(epochs)]
    sizes = [
        f"{size} px from epoch {first + 1} on"
        if first < min(end, len(epochs))
        else f"{size} px in no epoch (a size starts with a whole one)"
        for (first, size), end in zip(resolutions.sizes, ends, strict=True)
    ]
    shapes = len({size for _, size in epochs})
    compiled = " and compiles" if situation.chosen["compile"] else ""
    warms = situation.on_gpu or situation.chosen["compile"]
    cost = f"; warms{compiled} {shapes} shape(s) before the first step" if warms else ""
    return Decision(
        wanted, f"{', '.join(sizes)}: {share:.0%} of the pixels at {facts.image_size} px{cost}"
    )


PROGRESSIVE_RESOLUTION = Switch(
    key="progressive_resolution",
    name="progressive resolution",
    numbers="different",
    choose=_progressive_resolution,
    card=Card(
        use="Short trainings: small images cost less, and the last epochs see the full size. Files "
        "are decoded at each size, arrays are resized on the device. Sizes change between epochs.",
        price=f"A shape for each size: a GPU warms it, and compile compiles it, before the first "
        f"step. A recorded step (cuda_graph) has one shape, so the plan leaves it off. "
        f"{_UNMEASURED}",
        failure="The statistics of the norms belong to the last size; very small first sizes lose "
        "what the images show.",
        source="Howard et al., DAWNBench 2018 (fast.ai); Touvron et al., Fixing the train-test "
        "resolution discrepancy, arXiv 1906.06423; FFCV's ImageNet recipes, arXiv 2306.12517",
    ),
)

TRAIN_ON_HARDEST = Switch(
    key="train_on_hardest",
    name="training on the hardest images",
    numbers="different",
    choose=as_asked("train_on_hardest"),
    card=Card(
        use="Most images are fitted already: a forward pass finds the share of each batch with the "
        "largest loss, and only those are trained on. Each process chooses from its own part.",
        price="A forward pass of the whole batch, which counts in the FLOPs of an image and in the "
        "time. images/s counts all images that were looked at. Several processes exchange the "
        f"norms' statistics in every step. {_UNMEASURED}",
        failure="Wrong labels have the largest loss. The forward pass is in evaluation mode, so in "
        "the first steps it judges by norm statistics that are not yet reliable. The training "
        "accuracy is that of the hard images.",
        source="Jiang et al., Accelerating Deep Learning by Focusing on the Biggest Losers, "
        "arXiv 1910.00762",
    ),
)


AVERAGE_FROM = Switch(
    key="average_from",
    name="even weight average",
    numbers="different",
    choose=as_asked("average_from"),
    card=Card(
        use="The last part of a run at a high, even rate: the mean of its weights is evaluated and "
        "saved, which is often better than the last ones.",
        price=f"A second copy of the weights, and one pass over them each step. {_UNMEASURED}",
        failure="A rate that falls to zero leaves nothing to average. The norms' statistics are "
        "averaged too, and fit the mean weights badly: set recompute_norm_batches.",
        source="Izmailov et al., Averaging Weights Leads to Wider Optima, arXiv 1803.05407",
    ),
)


def _recompute_norm_batches(situation: Situation) -> Decision:
    config = situation.config
    if config.recompute_norm_batches and not (config.ema_decay or config.average_from):
        return Decision(0, "there is no weight average: the norms have statistics of their own")
    if config.recompute_norm_batches and situation.facts.storage == "loader":
        raise UserError(
            "recompute_norm_batches reads the training set, and your own loader gives it once",
            "set recompute_norm_batches to 0",
        )
    return Decision(config.recompute_norm_batches)


RECOMPUTE_NORM_BATCHES = Switch(
    key="recompute_norm_batches",
    name="new statistics for the average",
    numbers="different",
    choose=_recompute_norm_batches,
    card=Card(
        use="A weight average is evaluated: its batch norms get the statistics of its own "
        "activations, over this many augmented training batches.",
        price="Forward passes of these batches before each evaluation, counted in eval_seconds, "
        f"and loader processes of their own for image files. {_UNMEASURED}",
        failure="Few batches give noisy statistics. It does nothing without a weight average.",
        source="Izmailov et al., Averaging Weights Leads to Wider Optima, arXiv 1803.05407, "
        "section 3.2",
    ),
)

TTA = Switch(
    key="tta",
    name="test-time augmentation",
    numbers="same",
    choose=as_asked("tta"),
    card=Card(
        use="To compare with results that were reported with it. val/acc1_tta stands beside "
        "val/acc1 and never replaces it: the best checkpoint is chosen by val/acc1.",
        price="mirror evaluates 2 views of each image, mirror-translate 6.",
        failure="mirror changes the class of digits and writing. The views shift by one pixel, "
        "which large images hardly notice.",
        source="K. Jordan, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU, arXiv 2404.00498, "
        "section 3.5",
    ),
)

SHORT_RUNS = (
    PROGRESSIVE_RESOLUTION,
    TRAIN_ON_HARDEST,
    AVERAGE_FROM,
    RECOMPUTE_NORM_BATCHES,
    TTA,
)
