"""Part 1: the multilayer perceptron, its data, its warp, and its quality on the real MNIST."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small_config, small_data
from sklearn.datasets import load_digits
from torch.optim import AdamW

import part1_mlp_mnist as part1


@pytest.fixture
def load(monkeypatch, tmp_path):
    """load_data with these settings, of the digits that stand in for MNIST."""
    monkeypatch.setattr(part1.DATASET, "mirrors", ())
    cpu = torch.device("cpu")
    return lambda **settings: part1.load_data(part1.Config(data_dir=tmp_path, **settings), cpu)


def pixels(data, split):
    return (split.images * data.std + data.mean).round().byte()


def keys(images):
    return [image.numpy().tobytes() for image in images]


@pytest.mark.parametrize("hidden", [(), (7,), (6, 5, 4)])
def test_mlp_equals_the_formula(hidden):
    torch.manual_seed(0)
    model = part1.MLP(hidden, dropout=0.5).double()
    model(torch.randn(9, 28, 28, dtype=torch.float64))  # moves the running statistics
    images = torch.randn(9, 28, 28, dtype=torch.float64)
    h = images.flatten(1)
    for i in range(0, 4 * len(hidden), 4):
        linear, norm, _, _ = model.layers[i : i + 4]
        nn_init = torch.nn.init.normal_
        nn_init(norm.weight)
        nn_init(norm.bias)
        normal = (h @ linear.weight.T - norm.running_mean) / (norm.running_var + 1e-5).sqrt()
        h = torch.clamp(normal * norm.weight + norm.bias, min=0)
    last = model.layers[-1]
    torch.testing.assert_close(model.eval()(images), h @ last.weight.T + last.bias)


def test_every_image_is_predicted_in_order_and_nothing_is_recorded():
    model = part1.MLP((4,), dropout=0.5)
    images = torch.randn(2001, 28, 28)
    logits = part1.predict(model, images)
    assert logits.shape == (2001, 10)
    assert not logits.requires_grad
    assert not model.training
    torch.testing.assert_close(logits, model(images))


def test_the_splits_are_all_digits_and_share_none(load):
    data = load()
    found = [keys(pixels(data, split)) for split in (data.train, data.val, data.test)]
    small = torch.tensor(load_digits().images)[:, None] * (255 / 16)
    large = F.interpolate(small, size=(28, 28), mode="bilinear")[:, 0].round().byte()
    assert [len(split) for split in found] == [1284, 213, 300]
    assert sorted(sum(found, [])) == sorted(keys(large))
    assert len(set(keys(large))) == 1797  # no digit repeats
    labels = torch.cat([data.train.labels, data.val.labels, data.test.labels]).tolist()
    right = dict(zip(keys(large), load_digits().target, strict=True))
    assert labels == [right[key] for key in sum(found, [])]


def test_the_seed_chooses_the_validation_images_and_never_the_test_images(load):
    first = load(seed=3)
    again = load(seed=3)
    other = load(seed=4)
    assert torch.equal(first.val.images, again.val.images)
    assert set(keys(pixels(first, first.val))) != set(keys(pixels(other, other.val)))
    assert torch.equal(pixels(first, first.test), pixels(other, other.test))


def test_images_are_normalised_by_the_training_split(load):
    data = load()
    std, mean = torch.std_mean(pixels(data, data.train).float())
    assert data.mean == pytest.approx(mean.item())
    assert data.std == pytest.approx(std.item())
    assert abs(data.train.images.mean()) < 1e-5
    assert abs(data.train.images.std() - 1) < 1e-5


def test_a_batch_that_is_larger_than_the_training_split_is_refused(load):
    load(batch_size=1284)
    with pytest.raises(part1.UserError, match="batch_size is 1285"):
        load(batch_size=1285)


def test_the_warp_moves_every_image_a_little():
    torch.manual_seed(0)
    images = torch.zeros(200, 28, 28)
    images[:, 6:22, 12:16] = 1  # an upright bar
    warped = part1.augment(images, 1.0)
    assert len(set(keys(warped))) == 200  # each in its own way
    overlap = (warped * images).sum((1, 2)) / images.sum((1, 2))
    assert 0.5 < overlap.mean() < 0.9
    assert 0.8 < warped.sum() / images.sum() < 1.2


def test_the_warp_keeps_to_the_image_and_goes_on_beyond_its_border():
    images = torch.randn(20, 28, 28)
    torch.testing.assert_close(part1.augment(images, 0.0), images, rtol=0, atol=1e-4)
    bright = torch.full((20, 28, 28), 7.0)
    torch.testing.assert_close(part1.augment(bright, 1.0), bright)


@pytest.mark.parametrize("learnable", [False, True])
def test_the_best_epoch_is_kept_and_of_equals_the_first(learnable):
    torch.manual_seed(0)
    data = small_data(part1, n_val=200)
    if not learnable:  # then the best epoch is any
        data = data._replace(val=data.val._replace(labels=torch.randint(10, (200,))))
    model = part1.MLP((64,))
    history, best = part1.train(model, data, part1.Config(epochs=8, batch_size=64))
    accuracies = [row["val_accuracy"] for row in history]
    assert best is history[np.argmax(accuracies)]  # the first of the largest
    assert best is not history[-1]
    logits = part1.predict(model, data.val.images)
    right = logits.argmax(1) == data.val.labels
    assert best["val_accuracy"] == right.float().mean().item()
    assert best["val_loss"] == F.cross_entropy(logits, data.val.labels).item()


def two_epochs(model, config):
    """The batches of images that the model sees, and the learning rate after each epoch."""
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    optimizer = AdamW(model.parameters())
    rates = []
    for epoch in (1, 2):
        part1.train_epoch(model, small_data(part1), config, optimizer, epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    return torch.cat(seen), rates
