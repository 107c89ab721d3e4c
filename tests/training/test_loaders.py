import pytest
import torch

from training_framework.config import TrainConfig
from training_framework.plan import plan_run
from training_framework.training.loaders import Loaders

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "own_network", "dtype"),
    [
        ("32", None, torch.float32),
        ("bf16-mixed", None, torch.bfloat16),
        ("16-mixed", None, torch.float16),
        ("bf16-mixed", "Net", torch.float32),  # it need not begin with a convolution
    ],
)
def test_images_come_in_the_precision_that_autocast_would_cast_them_to(
    precision, own_network, dtype
):
    config = TrainConfig(
        data="synthetic", synthetic_train_images=16, synthetic_val_images=8, img_size=8,
        batch_size=8, accelerator="cpu", precision=precision, num_workers=0,
    )  # fmt: skip
    loaders = Loaders.build(plan_run(config, own_network=own_network), CPU)
    images, _, _ = loaders.train_transform(next(loaders.train.epoch(0)), step=0, epoch=0)
    evaluated, _ = loaders.eval_transform(next(loaders.val.epoch(0)))
    assert (images.dtype, evaluated.dtype) == (dtype, dtype)
