"""Part 2: the cells against torch.nn's, the classifier, and its quality on Fashion-MNIST."""

import functools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import small_data
from torch.optim.optimizer import register_optimizer_step_post_hook as hook

import part2_rnn_fashion as part2

TORCHS = {"tanh": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}


@pytest.mark.parametrize("cell", TORCHS)
@pytest.mark.parametrize("case", range(25))
def test_values_states_and_gradients_equal_torchs(cell, case):
    draw = random.Random(case)
    T, B, size, H = (draw.randint(1, n) for n in (9, 7, 6, 8))
    torch.manual_seed(case)
    reference = TORCHS[cell](size, H).double()
    ours = part2.RecurrentLayer(size, H, cell).double()
    ours.load_state_dict(reference.state_dict(), strict=True)
    reference.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(T, B, size, dtype=torch.float64)
    state = [torch.randn(1, B, H, dtype=torch.float64) for _ in range(1 + (cell == "lstm"))]
    state = state if case % 2 else []

    def results(model):
        inputs = [t.clone().requires_grad_() for t in (x, *state)]
        given = tuple(inputs[1:]) if cell == "lstm" else inputs[-1]
        output, last = model(inputs[0], given) if state else model(inputs[0])
        outputs = [output, *last] if cell == "lstm" else [output, last]
        torch.manual_seed(case)  # the same random weighting of the outputs makes one number
        loss = sum((y * torch.randn_like(y)).sum() for y in outputs)
        named = dict(model.named_parameters())
        gradients = torch.autograd.grad(loss, inputs + [named[k] for k in sorted(named)])
        return [*outputs, *gradients]

    for mine, torchs in zip(results(ours), results(reference), strict=True):
        assert mine.shape == torchs.shape
        assert (mine - torchs).abs().max() < 1e-9


@pytest.mark.parametrize("cell", TORCHS)
def test_a_step_sees_earlier_rows_and_no_later_ones(cell):
    torch.manual_seed(0)
    rnn = part2.RecurrentLayer(3, 5, cell)
    x = torch.randn(8, 2, 3)
    changed = x.clone()
    changed[4] += 1
    before, after = rnn(x)[0], rnn(changed)[0]
    assert torch.equal(before[:4], after[:4])
    assert ((before[4:] - after[4:]).abs().amax((1, 2)) > 0).all()


@pytest.mark.parametrize("settings", [
    {}, {"rows_per_step": 4}, {"rows_per_step": 28}, {"encoder_size": 5}, {"readout": "last"},
    {"bidirectional": True, "cell": "lstm"}, {"bidirectional": True, "readout": "last"},
    {"context": 1, "rows_per_step": 2, "cell": "gru"},
])  # fmt: skip
def test_state_is_fresh_for_every_batch(settings):
    torch.manual_seed(0)
    model = part2.RowRNN(part2.Config(hidden_size=12, **settings)).eval()
    images = torch.randn(20, 28, 28)
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
        backwards = model(images.flip(0)).flip(0)
    assert together.shape == (20, 10)
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together, backwards, atol=1e-5)


def test_rows_are_read_in_order_and_none_is_lost():
    torch.manual_seed(0)
    model, seen = part2.RowRNN(part2.Config(hidden_size=4, encoder_size=3, rows_per_step=4)), []
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.randn(3, 28, 28)
    model(images)
    assert torch.equal(seen[0].transpose(0, 1).reshape(3, 28, 28), images)
    assert seen[0].shape == (7, 3, 112)
    # A step of two rows with one of context sees four; above the first row there is nothing.
    model = part2.RowRNN(part2.Config(encoder_size=3, rows_per_step=2, context=1))
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(images)
    steps = seen[1].view(14, 3, 4, 28)
    assert (steps[0, :, 0] == 0).all() and (steps[-1, :, -1] == 0).all()
    assert all(torch.equal(steps[t], images[:, 2 * t - 1 : 2 * t + 3]) for t in range(1, 13))


@pytest.mark.parametrize("cell", TORCHS)
def test_orthogonal_start_of_every_gate(cell):
    for orthogonal in (True, False):
        model = part2.RowRNN(part2.Config(hidden_size=16, cell=cell, orthogonal=orthogonal))
        for weight in model.rnns[0].weight_hh_l0.detach().split(16):
            assert torch.allclose(weight @ weight.T, torch.eye(16), atol=1e-5) is orthogonal


def test_readouts_are_the_states_that_they_name():
    """In two directions: the second layer's last state is the one that has read the top row."""
    torch.manual_seed(0)
    images = torch.randn(3, 28, 28)
    for readout in ("last", "pool"):
        settings = {"hidden_size": 6, "bidirectional": True, "readout": readout}
        model = part2.RowRNN(part2.Config(**settings)).eval()
        reference = torch.nn.RNN(128, 6, bidirectional=True)
        for name, parameter in reference.named_parameters():
            own = model.rnns["reverse" in name].get_parameter(name.removesuffix("_reverse"))
            parameter.data.copy_(own)
        output, _ = reference(model.encoder(images.transpose(0, 1)))  # (28, 3, 12)
        seen = torch.cat([output[-1, :, :6], output[0, :, 6:]], 1)
        if readout == "pool":
            seen = torch.cat([output.mean(0), output.max(0).values], 1)
        assert torch.allclose(model(images), model.classifier(seen), atol=1e-6)


def test_overfits_64_images():
    torch.manual_seed(0)
    data = small_data(part2, n_train=64)._replace(train_labels=torch.randint(10, (64,)))
    data = data._replace(val_images=data.train_images, val_labels=data.train_labels)
    settings = {"hidden_size": 64, "epochs": 60, "batch_size": 32, "lr": 5e-3, "mirror": False}
    model = part2.RowRNN(config := part2.Config(**settings))
    part2.train(model, data, config)
    assert (part2.predict(model, data.train_images).argmax(1) == data.train_labels).all()


def test_dropout_is_off_after_every_validation_and_on_again_in_the_next_epoch():
    data, modes = small_data(part2), []
    config = part2.Config(hidden_size=4, encoder_size=4, batch_size=128, epochs=2, dropout=0.5)
    model = part2.RowRNN(config)
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    part2.train(model, data, config)
    assert modes == [True, True, False] * 2  # two batches, one validation


def test_a_long_gradient_is_clipped_and_a_short_one_is_not():
    data, settings = small_data(part2), {"hidden_size": 8, "batch_size": 256, "mirror": False}
    for clip_norm, norm in ((1e-3, 1e-3), (1e6, None)):
        torch.manual_seed(0)
        config = part2.Config(**settings, epochs=1, clip_norm=clip_norm)
        model = part2.RowRNN(config)
        loss = F.cross_entropy(model(data.train_images), data.train_labels)
        adamw = torch.optim.AdamW(model.parameters())
        losses = part2.train_epoch(model, data, config, adamw, 1)
        assert math.isclose(losses.item(), loss.item(), rel_tol=1e-5)  # without smoothing
        length = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
        assert math.isclose(length, norm, rel_tol=1e-3) if norm else length > 0.1


@pytest.mark.parametrize(("ema", "decay"), [(0, 0), (0.5, 0.5)])  # over none, or two, of four steps
def test_the_running_mean_of_the_weights_is_kept(ema, decay):
    config, seen = part2.Config(hidden_size=4, batch_size=64, epochs=1, ema=ema), []
    model, data = part2.RowRNN(config), small_data(part2)
    with hook(lambda adamw, *_: seen.append(adamw.param_groups[0]["params"][0].clone())):
        history = part2.train(model, data, config)
    mean = functools.reduce(lambda old, new: decay * old + (1 - decay) * new, seen)
    assert len(seen) == 4 and torch.allclose(next(model.parameters()), mean, atol=1e-6)
    val_loss = F.cross_entropy(part2.predict(model, data.val_images), data.val_labels).item()
    assert val_loss == history[0].val_loss


def test_gradient_by_step_is_zero_where_the_net_cannot_look():
    torch.manual_seed(0)
    model = part2.RowRNN(part2.Config(hidden_size=8, readout="last"))
    norms = part2.gradient_by_step(model, small_data(part2))
    assert norms.shape == (28,) and (norms > 0).all()
    model.rnns[0].weight_hh_l0.data.zero_()
    norms = part2.gradient_by_step(model, small_data(part2))
    assert norms[-1] > 0 and (norms[:-1] == 0).all()


def test_half_of_the_images_are_mirrored_as_a_whole():
    torch.manual_seed(0)
    images = torch.randn(1000, 28, 28)
    mirrored = part2.mirror(images)
    turned = (mirrored == images.flip(2)).all((1, 2))
    assert (turned | (mirrored == images).all((1, 2))).all()
    assert 430 < turned.sum() < 570


def test_quality_gate(data_dir, tmp_path):
    """The default reaches the mean of ten seeds less three standard deviations (see the page)."""
    results = part2.main(part2.Config(data_dir=data_dir, images_dir=tmp_path, device="cpu"))
    assert results["dataset"] == "FashionMNIST"
    assert results["confusion_matrix"].sum() == 10_000
    assert min(results[name] for name in ("accuracy", "precision", "recall", "f1")) > 0.9
