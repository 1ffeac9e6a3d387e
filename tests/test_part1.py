"""Part 1: the multilayer perceptron, its data, its warp, and its quality on the real MNIST."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small_data
from sklearn.datasets import load_digits

import part1_mlp_mnist as part1

CPU = torch.device("cpu")


@pytest.mark.parametrize("hidden", [(), (7,), (6, 5, 4)])
def test_mlp_equals_matrices_multiplied_by_hand(hidden):
    torch.manual_seed(0)
    model = part1.MLP(hidden, dropout=0.5).double().eval()
    for layer in model.layers:
        if isinstance(layer, torch.nn.BatchNorm1d):  # statistics and gains unlike the initial ones
            for tensor in (layer.running_mean, layer.weight.data, layer.bias.data):
                tensor.normal_()
            layer.running_var.uniform_(0.5, 2)
    x = torch.randn(9, 28, 28, dtype=torch.float64)

    h = x.reshape(9, 784).numpy()
    weights = {k: v.numpy() for k, v in model.state_dict().items()}
    for i in range(0, 4 * len(hidden), 4):  # linear, norm, relu, dropout
        h = h @ weights[f"layers.{i}.weight"].T
        mean, var = (weights[f"layers.{i + 1}.running_{k}"] for k in ("mean", "var"))
        gain, shift = weights[f"layers.{i + 1}.weight"], weights[f"layers.{i + 1}.bias"]
        h = np.maximum((h - mean) / np.sqrt(var + 1e-5) * gain + shift, 0)
    last = 4 * len(hidden)
    by_hand = h @ weights[f"layers.{last}.weight"].T + weights[f"layers.{last}.bias"]
    with torch.no_grad():
        assert np.abs(model(x).numpy() - by_hand).max() < 1e-10


def test_every_image_is_predicted_and_nothing_is_recorded():
    model, images = part1.MLP((4,), dropout=0.5), torch.randn(5001, 28, 28)
    logits = part1.predict(model, images)
    assert logits.shape == (5001, 10) and not logits.requires_grad
    assert torch.allclose(logits[-1], model.eval()(images[-1:])[0], atol=1e-6)


def test_splits_are_seeded_disjoint_whole_and_normalised_by_training(monkeypatch, tmp_path):
    monkeypatch.setattr(part1, "MIRRORS", [])
    pixels = torch.cat([part1.read_dataset(tmp_path)[i] for i in (2, 4)])  # (1797, 28, 28)
    assert len({image.numpy().tobytes() for image in pixels}) == 1797  # no image repeats

    def load(seed):
        return part1.load_data(part1.Config(data_dir=tmp_path, seed=seed), CPU)

    data = load(3)
    order = torch.randperm(1497, generator=torch.Generator().manual_seed(3))
    std, mean = torch.std_mean(pixels[order[:1284]].float())
    assert (data.mean, data.std) == (mean.item(), std.item())
    splits = [data.train_images, data.val_images, data.test_images]
    assert [len(images) for images in splits] == [1284, 213, 300]
    back = torch.cat(splits).mul(std).add(mean).round().byte()
    assert torch.equal(back, pixels[torch.cat([order, torch.arange(1497, 1797)])])
    labels = torch.cat([data.train_labels, data.val_labels, data.test_labels])
    found = {image.numpy().tobytes(): int(y) for image, y in zip(back, labels, strict=True)}
    bundled = torch.tensor(load_digits().images)[:, None] * (255 / 16)
    large = F.interpolate(bundled, size=(28, 28), mode="bilinear")[:, 0].round().byte()
    digits = zip(large, load_digits().target, strict=True)
    assert found == {image.numpy().tobytes(): int(y) for image, y in digits}

    again, other = load(3), load(4)
    assert torch.equal(data.train_images, again.train_images)
    assert not torch.equal(data.train_images, other.train_images)
    assert torch.equal(data.test_labels, other.test_labels)
    with pytest.raises(part1.UserError, match="batch_size is 1285"):
        part1.load_data(part1.Config(data_dir=tmp_path, batch_size=1285), CPU)


def test_warp_keeps_shape_range_and_image():
    torch.manual_seed(0)
    images = torch.zeros(200, 28, 28)
    images[:, 6:22, 12:16] = 1  # an upright bar
    warped = part1.augment(images, 1.0)
    assert warped.shape == images.shape
    assert warped.min() >= 0 and warped.max() <= 1
    assert (warped != images).flatten(1).any(1).all()  # every image moved ...
    overlap = (warped * images).sum((1, 2)) / images.sum((1, 2))
    assert overlap.mean() > 0.5  # ... yet stays where it was, by and large
    assert 0.7 < (warped.sum() / images.sum()).item() < 1.3


@pytest.mark.parametrize("learnable", [False, True])
def test_the_best_epoch_is_kept_and_among_equals_the_one_of_the_lower_loss(learnable):
    """Validation labels unrelated to the images: the best epoch is not the last."""
    torch.manual_seed(0)
    data, model = small_data(part1, n_val=200), part1.MLP((64,))
    labels = data.val_labels if learnable else torch.randint(10, (200,))
    config = part1.Config(epochs=8, batch_size=64)
    history = part1.train(model, data._replace(val_labels=labels), config)
    assert history[0].train_loss < 3  # a mean, not a sum
    best = max(history, key=lambda epoch: (epoch.val_accuracy, -epoch.val_loss))
    tied = [epoch for epoch in history if epoch.val_accuracy == best.val_accuracy]
    assert len(tied) > 1 if learnable else best is not history[-1]
    logits = part1.predict(model, data.val_images)
    assert F.cross_entropy(logits, labels).item() == best.val_loss
    assert (logits.argmax(1) == labels).float().mean().item() == best.val_accuracy


def test_an_epoch_takes_every_image_at_most_once_and_in_another_order_each_time():
    data, seen = small_data(part1), []
    model = part1.MLP(()).eval()  # as scoring leaves it
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    adamw = torch.optim.AdamW(model.parameters())
    config = part1.Config(batch_size=100, epochs=2)
    for epoch in (1, 2):
        losses = part1.train_epoch(model, data, config, adamw, epoch)
        assert losses.shape == (2,) and model.training
    images = {image.numpy().tobytes() for image in data.train_images}
    first, second = ([x.numpy().tobytes() for x in torch.cat(seen[i : i + 2])] for i in (0, 2))
    assert set(first) <= images and len(set(first)) == len(set(second)) == 200
    assert first != second


def test_each_step_uses_its_own_gradient():
    """With hardly any learning rate, the gradient of the second step is that of the first."""
    data, model = small_data(part1), part1.MLP(())
    config = part1.Config(batch_size=256, epochs=2, lr=1e-9, weight_decay=0)
    adamw, gradients = torch.optim.AdamW(model.parameters()), []
    for epoch in (1, 2):
        part1.train_epoch(model, data, config, adamw, epoch)
        gradients.append(model.layers[0].weight.grad.clone())
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 1e-3


def test_label_smoothing_and_weight_decay_are_those_of_the_settings():
    """One step from zero weights: AdamW's first step is lr times the gradient's sign."""
    data = small_data(part1)
    for smoothing in (0.0, 0.5):
        model = part1.MLP(())
        torch.nn.init.ones_(model.layers[0].weight)
        torch.nn.init.zeros_(model.layers[0].bias)
        config = part1.Config(batch_size=256, epochs=1, label_smoothing=smoothing, weight_decay=0.5)
        adamw = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay)
        losses = part1.train_epoch(model, data, config, adamw, 1)
        assert math.isclose(losses.item(), math.log(10), rel_tol=1e-5)  # without smoothing
        targets = F.one_hot(data.train_labels, 10) * (1 - smoothing) + smoothing / 10
        assert torch.allclose(model.layers[0].bias.grad, (0.1 - targets).mean(0), atol=1e-6)
        shrunk = 1 - config.lr * 0.5  # of the weights, beside a step of at most lr
        assert (model.layers[0].weight - shrunk).abs().max() <= 1.01 * config.lr


def test_quality_gate(data_dir, tmp_path):
    """The default reaches the mean of five seeds less three standard deviations (see the page)."""
    results = part1.main(part1.Config(data_dir=data_dir, images_dir=tmp_path, device="cpu"))
    assert results["dataset"] == "MNIST"
    assert results["confusion_matrix"].sum() == 10_000
    assert min(results[name] for name in ("accuracy", "precision", "recall", "f1")) > 0.985
