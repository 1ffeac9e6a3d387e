"""Part 1: the multilayer perceptron, its data, its warp, and its quality on the real MNIST."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import small_config, small_data, unrendered
from sklearn.datasets import load_digits
from torch.optim import AdamW

import part1_mlp_mnist as part1


@pytest.fixture
def load(monkeypatch, tmp_path):
    """load_data with these settings, of the digits that stand in for MNIST."""
    monkeypatch.setattr(part1.DATASET, "mirrors", ())
    cpu = torch.device("cpu")
    return lambda **settings: part1.load_data(part1.Config(data_dir=tmp_path, **settings), cpu)


def keys(images):
    return [image.numpy().tobytes() for image in images]


@pytest.mark.parametrize("hidden", [(), (7,), (6, 5, 4)])
def test_mlp_equals_its_formula(hidden):
    torch.manual_seed(0)
    model = part1.MLP(hidden, dropout=0.5).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    images = torch.randn(9, 28, 28, dtype=torch.float64)
    model(images)  # in training, which moves the running statistics
    h = images.flatten(1)
    for i in range(0, 4 * len(hidden), 4):
        linear, norm, _, _ = model.layers[i : i + 4]
        normal = (h @ linear.weight.T - norm.running_mean) / (norm.running_var + 1e-5).sqrt()
        h = torch.clamp(normal * norm.weight + norm.bias, min=0)
    logits = h @ model.layers[-1].weight.T + model.layers[-1].bias
    torch.testing.assert_close(model.eval()(images), logits, rtol=0, atol=1e-9)


def test_every_image_is_predicted_in_order_and_nothing_is_recorded():
    model = part1.MLP((4,), dropout=0.5)
    images = torch.randn(2001, 28, 28)
    logits = part1.predict(model, images)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, model.eval()(images))


def test_the_splits_share_no_digit_and_are_normalised_by_the_training_split(load):
    small = torch.tensor(load_digits().images)[:, None] * (255 / 16)
    large = F.interpolate(small, size=(28, 28), mode="bilinear")[:, 0].round().byte()
    labels = dict(zip(keys(large), load_digits().target, strict=True))
    data = load()
    for split in (data.train, data.val, data.test):
        pixels = (split.images * data.std + data.mean).round().byte()
        assert [labels.pop(key) for key in keys(pixels)] == split.labels.tolist()
    assert not labels  # every digit stood in one of them
    assert [len(data.train.labels), len(data.val.labels)] == [1284, 213]
    assert data.train.images.mean().item() == pytest.approx(0, abs=1e-4)
    assert data.train.images.std().item() == pytest.approx(1, abs=1e-4)


def test_the_seed_chooses_the_validation_images_and_never_the_test_images(load):
    assert torch.equal(load(seed=3).val.labels, load(seed=3).val.labels)
    assert not torch.equal(load(seed=3).val.labels, load(seed=4).val.labels)
    assert torch.equal(load(seed=3).test.labels, load(seed=4).test.labels)


def test_a_batch_that_is_larger_than_the_training_split_is_refused(load):
    with pytest.raises(part1.UserError, match="batch_size is 1285"):
        load(batch_size=1285)


def test_the_warp_moves_each_image_a_little_and_goes_on_beyond_its_border():
    torch.manual_seed(0)
    images = torch.zeros(200, 28, 28)
    images[:, 6:22, 12:16] = 1  # an upright bar
    warped = part1.augment(images, 1.0)
    assert len(set(keys(warped))) == 200
    assert 0.5 < (warped * images).sum() / images.sum() < 0.9
    torch.testing.assert_close(part1.augment(images + 7, 1.0)[:, 0], images[:, 0] + 7)


@pytest.mark.parametrize("learnable", [False, True])
def test_the_best_epoch_is_kept_and_of_equals_the_first(learnable):
    torch.manual_seed(0)
    data = small_data(part1, n_val=200)
    if not learnable:  # then any epoch may be the best
        data = data._replace(val=data.val._replace(labels=torch.randint(10, (200,))))
    model = part1.MLP((64,))
    history, best = part1.train(model, data, part1.Config(epochs=8, batch_size=64))
    assert best is max(history, key=lambda row: row["val_accuracy"])  # the first of several
    assert best is not history[-1]
    logits = part1.predict(model, data.val.images)
    assert best["val_accuracy"] == (logits.argmax(1) == data.val.labels).float().mean().item()
    assert best["val_loss"] == F.cross_entropy(logits, data.val.labels).item()


def images_seen(model, config):
    """Every image that the model is given in one epoch of small_data, in order."""
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.extend(keys(inputs[0])))
    part1.train_epoch(model, small_data(part1), config, AdamW(model.parameters()), epoch=1)
    return seen


def test_an_epoch_takes_every_image_at_most_once_and_in_another_order_each_time():
    model = part1.MLP(()).eval()  # as scoring leaves it
    first = images_seen(model, small_config(part1, batch_size=100))
    assert model.training
    assert len(set(first)) == 200
    assert set(first) <= set(keys(small_data(part1).train.images))
    assert first != images_seen(part1.MLP(()), small_config(part1, batch_size=100))


def test_images_are_warped_in_training_if_that_is_wanted():
    warped = images_seen(part1.MLP(()), small_config(part1, augment=1.0))
    assert not set(warped) & set(keys(small_data(part1).train.images))


def test_training_is_adamw_on_smoothed_labels_at_a_rate_that_rises_and_falls():
    data = small_data(part1)
    config = part1.Config(epochs=2, batch_size=128, lr=0.1, weight_decay=2, label_smoothing=0.5)
    model = part1.MLP((8,))
    reference = copy.deepcopy(model)
    torch.manual_seed(0)
    history, _ = part1.train(model, data, config)
    torch.manual_seed(0)
    optimizer = AdamW(reference.parameters(), weight_decay=2)
    losses = []
    orders = torch.cat([torch.randperm(256), torch.randperm(256)])
    for batch, rate in zip(orders.split(128), (16, 15, 10, 5), strict=True):
        optimizer.param_groups[0]["lr"] = 0.1 * rate / 16
        logits = reference(data.train.images[batch])
        labels = data.train.labels[batch]
        optimizer.zero_grad()
        F.cross_entropy(logits, labels, label_smoothing=0.5).backward()
        optimizer.step()
        losses.append(F.cross_entropy(logits, labels).item())  # told without smoothing
    told = [row["train_loss"] for row in history]
    assert told == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2])


def test_main_trains_with_the_dropout_of_its_settings(load, monkeypatch, tmp_path):
    unrendered(part1, monkeypatch)
    losses = []
    for dropout in (0.0, 0.9):
        config = small_config(part1, dropout=dropout, data_dir=tmp_path, images_dir=tmp_path)
        losses.append(part1.main(config)["history"][-1]["train_loss"])
    assert losses[1] > losses[0] + 0.1


def test_quality_gate(data_dir, tmp_path):
    results = part1.main(part1.Config(data_dir=data_dir, images_dir=tmp_path, device="cpu"))
    assert results["dataset"] == "MNIST"
    assert results["confusion_matrix"].sum() == 10_000
    assert min(results[name] for name in ("accuracy", "precision", "recall", "f1")) > 0.985
