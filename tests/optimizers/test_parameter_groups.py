import torch
from torch import nn

from training_framework.optimizers import parameter_groups


def names_by_decay(model, groups):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        group["weight_decay"]: {names[parameter] for parameter in group["params"]}
        for group in groups
    }


class LayerNorm2d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))


class LayerScale(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))


def test_norms_and_biases_of_a_convolutional_net_are_not_decayed():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)
    )
    assert names_by_decay(model, parameter_groups(model, weight_decay=0.1)) == {
        0.1: {"0.weight", "3.weight"},
        0.0: {"1.weight", "1.bias", "3.bias"},
    }


def test_norms_are_known_by_type_and_name_whatever_their_shape():
    model = nn.ModuleDict(
        {
            "over_images": nn.LayerNorm((4, 8, 8)),
            "group": nn.GroupNorm(2, 4),
            "instance": nn.InstanceNorm2d(4, affine=True),
            "rms": nn.RMSNorm(4),
            "synchronized": nn.SyncBatchNorm(4),
            "foreign": LayerNorm2d(4),
        }
    )
    groups = parameter_groups(model, weight_decay=0.1)
    assert names_by_decay(model, groups) == {0.0: {name for name, _ in model.named_parameters()}}


def test_vectors_that_are_ordinary_weights_are_decayed():
    model = nn.ModuleDict({"slopes": nn.PReLU(4), "scale": LayerScale(4)})
    assert names_by_decay(model, parameter_groups(model, weight_decay=0.1)) == {
        0.1: {"slopes.weight", "scale.gamma"}
    }


def test_biases_under_compound_names_are_not_decayed():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "recurrent": nn.GRU(4, 4)})
    assert names_by_decay(model, parameter_groups(model, weight_decay=0.1))[0.0] == {
        "attention.in_proj_bias",
        "attention.out_proj.bias",
        "recurrent.bias_ih_l0",
        "recurrent.bias_hh_l0",
    }


def test_decay_of_norms_and_biases_can_be_asked_for():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    groups = parameter_groups(model, weight_decay=0.1, decay_norm_and_bias=True)
    assert names_by_decay(model, groups) == {0.1: {name for name, _ in model.named_parameters()}}


def test_a_shared_parameter_is_in_one_group_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    groups = parameter_groups(model, weight_decay=0.1)
    assert [len(group["params"]) for group in groups] == [1, 2]


def test_every_trainable_parameter_is_in_one_group_and_frozen_ones_in_none():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    groups = parameter_groups(model, weight_decay=0.1)
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == 4
    assert set(grouped) == {*model[0].parameters(), *model[1].parameters()}


def test_nothing_trainable_gives_no_group():
    assert parameter_groups(nn.Linear(2, 2).requires_grad_(False), weight_decay=0.1) == []
