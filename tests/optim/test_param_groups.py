"""Which parameters decay."""

import torch
from torch import nn

from glsd.optim import param_groups


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.linear = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        self.gain = nn.Parameter(torch.ones(5, 1))
        self.frozen = nn.Parameter(torch.ones(5, 5), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(2, 2))  # a bias by name, whatever its shape


def test_weights_decay_and_biases_and_vectors_do_not():
    model = Toy()
    decay, no_decay = param_groups(model.named_parameters())
    assert set(decay["names"]) == {"cls_token", "relative_position_bias_table", "linear.weight", "gain"}
    assert set(no_decay["names"]) == {"linear.bias", "norm.weight", "norm.bias", "bias"}
    named = dict(model.named_parameters())
    for group in (decay, no_decay):
        assert all(named[n] is p for n, p in zip(group["names"], group["params"], strict=True))
    assert decay["decays"]
    assert not no_decay["decays"]


def test_the_optimizer_takes_the_groups_and_keeps_them_apart():
    optimizer = torch.optim.AdamW(param_groups(Toy().named_parameters()), weight_decay=0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_a_parameter_under_two_names_is_taken_once():
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    model["b"] = model["a"]
    groups = param_groups(model.named_parameters(remove_duplicate=False))
    assert [len(group["params"]) for group in groups] == [1, 1]
