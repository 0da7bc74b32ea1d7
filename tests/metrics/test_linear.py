"""The linear probe against torch's own SGD, and what it must be able to do and must not."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glsd.errors import UserError
from glsd.metrics import linear
from glsd.rng import permutation

SETTINGS: dict[str, Any] = {
    "lr_list": (0.001, 0.01, 0.1, 1.0, 10.0),
    "epochs": 100,
    "batch_size": 256,
    "seed": 0,
}


def linear_probe(*sets, **changes):
    return linear.linear_probe(*sets, **{**SETTINGS, **changes})


def clusters(n, *, dim=12, num_classes=7, spread=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(num_classes, (n,), generator=generator)
    return centers[labels] + spread * torch.randn(n, dim, generator=generator), labels


def test_training_equals_torch_sgd_with_autograd():
    features, classes = clusters(70)
    epochs, batch_size, rates = 3, 32, [0.02, 0.5]
    weight, bias = linear._train(features, classes, 7, rates, epochs, batch_size, seed=4)
    start = linear._train(features, classes, 7, [1e-30], 1, batch_size, seed=4)
    for i, rate in enumerate(rates):
        layer = torch.nn.Linear(12, 7)
        layer.weight.data, layer.bias.data = start[0][0].T.clone(), start[1][0].clone()
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate * batch_size / 256, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * 3)
        for epoch in range(epochs):
            for rows in torch.from_numpy(permutation(70, seed=4, stream=epoch + 1)).split(batch_size):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(layer(features[rows]), classes[rows]).backward()
                optimizer.step()
                schedule.step()
        torch.testing.assert_close(weight[i].T, layer.weight.data, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(bias[i], layer.bias.data, rtol=1e-4, atol=1e-6)
    assert (weight[0] - weight[1]).abs().max() > 0.01


def test_every_image_once_per_epoch_and_never_in_the_same_order():
    orders = [permutation(50, seed=0, stream=epoch) for epoch in range(3)]
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 3


def test_weights_split_and_epochs_draw_from_streams_of_their_own(monkeypatch):
    streams = []
    philox = np.random.Philox

    def spy(key, counter):
        streams.append(tuple(map(int, key)))
        return philox(key=key, counter=counter)

    monkeypatch.setattr(np.random, "Philox", spy)
    train, labels = clusters(30)
    linear_probe(train, labels, train, labels, epochs=2, lr_list=(0.1, 1.0), seed=7)
    weights, first, second, split = 0, 1, 2, 2**63
    assert streams == [(7, s) for s in (split, weights, first, second, weights, first, second)]


def test_memory_does_not_hold_a_row_of_classes_per_image():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    n, num_classes = 2000, 300
    with Largest() as largest:
        linear._train(torch.ones(n, 2), torch.arange(n) % num_classes, num_classes, [0.1], 1, 50, seed=0)
    assert 50 * num_classes <= largest.numel < n * num_classes / 10


def test_logits_of_the_val_set_are_held_in_parts(monkeypatch):
    train, labels = clusters(300)
    val, val_labels = clusters(101, seed=1, spread=3.0)
    whole = linear_probe(train, labels, val, val_labels, epochs=5)
    assert 0.3 < whole.top1 < whole.top5 < 1
    for held in (1, 70, 705):  # a row, ten rows, all but one
        monkeypatch.setattr(linear, "_LOGITS_HELD", held)
        assert linear_probe(train, labels, val, val_labels, epochs=5) == whole


def test_reads_separable_classes_and_not_noise():
    train, labels = clusters(600, spread=0.2)
    val, val_labels = clusters(200, spread=0.2, seed=1)
    found = linear_probe(train, labels, val, val_labels, epochs=20)
    assert found.top1 > 0.97
    assert found.top5 >= found.top1
    noise = linear_probe(torch.randn_like(train), labels, torch.randn_like(val), val_labels, epochs=20)
    assert noise.top1 < 0.3


def test_is_deterministic_and_independent_of_the_val_set_and_of_label_values():
    train, labels = clusters(200)
    val, val_labels = clusters(60, seed=1)
    once = linear_probe(train, labels, val, val_labels, epochs=5, seed=3)
    torch.manual_seed(5)
    assert linear_probe(train, labels, val, val_labels, epochs=5, seed=3) == once
    assert linear_probe(train, 1000 * labels + 7, val, 1000 * val_labels + 7, epochs=5, seed=3) == once
    other = linear_probe(train, labels, val, (val_labels + 1) % 7, epochs=5, seed=3)
    assert (other.lr, other.held_out) == (once.lr, once.held_out)
    assert other.top1 < once.top1


def test_chooses_the_learning_rate_on_held_out_images():
    train, labels = clusters(300)
    val, val_labels = clusters(60, seed=1)
    found = linear_probe(train, labels, val, val_labels, lr_list=(1e-9, 0.5, 1e38), epochs=10)
    assert found.lr == 0.5
    assert found.held_out[0.5] > found.held_out[1e-9]
    assert found.held_out[1e38] == 0.0  # diverged
    single = linear_probe(train, labels, val, val_labels, lr_list=(0.5,), epochs=10)
    assert (single.top1, single.top5, single.lr) == (found.top1, found.top5, 0.5)
    assert single.held_out == {}


def test_an_unknown_val_label_is_never_right():
    train, labels = clusters(100)
    plain = linear_probe(train, labels, train, labels, lr_list=(0.5,), epochs=2)
    found = linear_probe(
        train, labels, torch.cat([train, train]), torch.cat([labels, labels + 100]), lr_list=(0.5,), epochs=2
    )
    assert (found.top1, found.top5) == (plain.top1 / 2, plain.top5 / 2)
    with pytest.raises(UserError, match="no class of the val set is in the train set"):
        linear_probe(train, labels, train, labels + 100, lr_list=(0.5,), epochs=2)


def test_bad_input_is_one_clear_line():
    train, labels = clusters(50)
    for settings, says in (
        ({"lr_list": ()}, r"lr_list is \[\]: expected one or more numbers above 0"),
        ({"lr_list": (0.1, -1.0)}, r"lr_list is \[0.1, -1.0\]: expected"),
        ({"epochs": 0}, "epochs is 0: expected 1 or more"),
        ({"batch_size": 0}, "batch_size is 0: expected 1 or more"),
    ):
        with pytest.raises(UserError, match=says):
            linear_probe(train, labels, train, labels, **settings)
    for seed in (-1, 2**63):
        with pytest.raises(UserError, match=f"seed is {seed}: expected 0 to"):
            linear_probe(train, labels, train, labels, seed=seed)
    with pytest.raises(UserError, match="not finite"):
        linear_probe(train * float("nan"), labels, train, labels)
    with pytest.raises(UserError, match="50 of 50 val"):
        linear_probe(train, labels, train, torch.full_like(labels, -1))
    with pytest.raises(UserError, match="train set is empty"):
        linear_probe(train[:0], labels[:0], train, labels)
    with pytest.raises(UserError, match="give one"):
        linear_probe(train[:5], labels[:5], train, labels)
