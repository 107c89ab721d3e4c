"""Switches for how the weights move."""

from training_framework.switches.switch import Card, Switch, as_asked

__all__ = ["UPDATES"]

OPTIMIZER = Switch(
    key="optimizer",
    name="optimizer",
    numbers="different",
    choose=as_asked("optimizer"),
    card=Card(
        use="Short trainings with muon: it moves the filters of a convolution equally far in all "
        "directions. What is no convolution's weight is left to `muon_rest`.",
        price="muon multiplies matrices as large as the weights in every step: little beside "
        "batches of hundreds of images. Not yet measured.",
        failure="With small batches, muon can take longer than the network. It is not "
        "recorded by cuda_graph.",
        source="K. Jordan et al., Muon: An optimizer for hidden layers in neural networks (2024); "
        "Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv 1711.05101",
    ),
)

BIAS_LR_FACTOR = Switch(
    key="bias_lr_factor",
    name="bias rates",
    numbers="different",
    choose=as_asked("bias_lr_factor"),
    card=Card(
        use="Short trainings with fixed norm scales: shifts and biases may learn 64 times as fast.",
        price="None. Not yet measured.",
        failure="Adam's steps have a size of their own, so a large factor makes them diverge.",
        source="Page, How to Train Your ResNet 8 (2019); K. Jordan, arXiv 2404.00498",
    ),
)

LOOKAHEAD_STEPS = Switch(
    key="lookahead_steps",
    name="lookahead",
    numbers="different",
    choose=as_asked("lookahead_steps"),
    card=Card(
        use="High learning rates: every few steps the weights go back part of the way to where "
        "they were.",
        price="A second copy of the weights, and a pass over them every `lookahead_steps` steps. "
        "Not yet measured.",
        failure="With a learning rate that has fallen to zero there is nothing left to smooth.",
        source="Zhang et al., Lookahead Optimizer: k steps forward, 1 step back, arXiv 1907.08610",
    ),
)

UPDATES = (OPTIMIZER, BIAS_LR_FACTOR, LOOKAHEAD_STEPS)
