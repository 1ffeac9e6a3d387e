"""Part 2: the tanh RNN against torch.nn.RNN, the classifier, and its quality on Fashion-MNIST."""

import math
import random

import pytest
import torch
from conftest import small_data

import part2_rnn_fashion as part2


@pytest.mark.parametrize("case", range(60))
def test_values_states_and_gradients_equal_torch_nn_rnn(case):
    draw = random.Random(case)
    T, B, size, H = (draw.randint(1, n) for n in (9, 7, 6, 8))
    layers, both = draw.randint(1, 3), draw.random() < 0.5
    torch.manual_seed(case)
    reference = torch.nn.RNN(size, H, num_layers=layers, bidirectional=both).double()
    ours = part2.TanhRNN(size, H, num_layers=layers, bidirectional=both).double()
    ours.load_state_dict(reference.state_dict(), strict=True)
    reference.load_state_dict(ours.state_dict(), strict=True)
    shape = (layers * (1 + both), B, H)
    h_0 = torch.randn(shape, dtype=torch.float64) if draw.random() < 0.5 else None
    x = torch.randn(T, B, size, dtype=torch.float64)

    def results(model):
        inputs = [t.clone().requires_grad_() for t in (x, h_0) if t is not None]
        output, h_n = model(*inputs)
        torch.manual_seed(case)  # the same random weighting of both outputs makes one number
        loss = (output * torch.randn_like(output)).sum() + (h_n * torch.randn_like(h_n)).sum()
        named = dict(model.named_parameters())
        gradients = torch.autograd.grad(loss, inputs + [named[k] for k in sorted(named)])
        return [output, h_n, *gradients]

    for mine, torchs in zip(results(ours), results(reference), strict=True):
        assert mine.shape == torchs.shape
        assert (mine - torchs).abs().max() < 1e-9


def test_one_step_worked_by_hand():
    """x = (1, 2), h_0 = (0.5, -0.5); a = W_ih x + b_ih + W_hh h_0 + b_hh = (0.55, -0.25)."""
    rnn = part2.TanhRNN(2, 2)
    rnn.load_state_dict(
        {
            "weight_ih_l0": torch.tensor([[0.1, 0.2], [0.3, -0.4]]),  # W_ih x = (0.5, -0.5)
            "weight_hh_l0": torch.tensor([[0.2, 0.4], [0.6, 0.0]]),  # W_hh h_0 = (-0.1, 0.3)
            "bias_ih_l0": torch.tensor([0.1, 0.0]),
            "bias_hh_l0": torch.tensor([0.05, -0.05]),
        }
    )
    output, h_n = rnn(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.5, -0.5]]]))
    by_hand = torch.tensor([math.tanh(0.55), math.tanh(-0.25)])
    assert torch.allclose(output.flatten(), by_hand, atol=1e-7)
    assert torch.equal(output[-1], h_n[0])


def test_a_step_sees_earlier_rows_and_no_later_ones():
    torch.manual_seed(0)
    rnn = part2.TanhRNN(3, 5, num_layers=2)
    x = torch.randn(8, 2, 3)
    changed = x.clone()
    changed[4] += 1
    before, after = rnn(x)[0], rnn(changed)[0]
    assert torch.equal(before[:4], after[:4])
    assert ((before[4:] - after[4:]).abs().amax((1, 2)) > 0).all()


@pytest.mark.parametrize("settings", [
    {}, {"rows_per_step": 4}, {"rows_per_step": 28}, {"encoder_size": 5}, {"readout": "last"},
    {"bidirectional": True, "num_layers": 2}, {"bidirectional": True, "readout": "last"},
    {"context": 1, "rows_per_step": 2},
])  # fmt: skip
def test_state_is_fresh_for_every_batch(settings):
    """Neither the order nor the company of images changes a prediction."""
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
    """The encoder sees rows_per_step rows at a time, the top ones first."""
    torch.manual_seed(0)
    model, seen = part2.RowRNN(part2.Config(hidden_size=4, encoder_size=3, rows_per_step=4)), []
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.randn(3, 28, 28)
    model(images)
    assert torch.equal(seen[0].transpose(0, 1).reshape(3, 28, 28), images)
    assert seen[0].shape == (7, 3, 112)


def test_context_shows_the_rows_above_and_below():
    """A step of two rows with one of context sees four; above the first row there is nothing."""
    config = part2.Config(hidden_size=4, encoder_size=3, rows_per_step=2, context=1)
    model, seen = part2.RowRNN(config), []
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.randn(3, 28, 28)
    model(images)
    steps = seen[0].view(14, 3, 4, 28)
    assert (steps[0, :, 0] == 0).all() and (steps[-1, :, -1] == 0).all()
    for t in range(1, 13):
        assert torch.equal(steps[t], images[:, 2 * t - 1 : 2 * t + 3])


def test_orthogonal_start():
    for orthogonal in (True, False):
        model = part2.RowRNN(part2.Config(hidden_size=16, orthogonal=orthogonal))
        weight = model.rnn.weight_hh_l0.detach()
        assert torch.allclose(weight @ weight.T, torch.eye(16), atol=1e-5) is orthogonal


def test_readouts_are_the_states_that_they_name():
    torch.manual_seed(0)
    images = torch.randn(3, 28, 28)
    for readout in ("last", "pool"):
        settings = {"hidden_size": 6, "num_layers": 2, "bidirectional": True, "readout": readout}
        model = part2.RowRNN(part2.Config(**settings)).eval()
        output, _ = model.rnn(model.encoder(images.transpose(0, 1)))  # (28, 3, 12)
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
    part2.train(model, data, config, [])
    assert (part2.predict(model, data.train_images).argmax(1) == data.train_labels).all()


def test_gradient_by_step_is_zero_where_the_net_cannot_look():
    """With a cut W_hh and the last state read, only the last row can matter."""
    torch.manual_seed(0)
    model = part2.RowRNN(part2.Config(hidden_size=8, readout="last"))
    norms = part2.gradient_by_step(model, small_data(part2))
    assert norms.shape == (28,) and (norms > 0).all()
    model.rnn.weight_hh_l0.data.zero_()
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
    """The default setting reaches 90 % with one seed (the mean over five is on the page)."""
    results = part2.main(part2.Config(data_dir=data_dir, images_dir=tmp_path, device="cpu"))
    assert results["dataset"] == "FashionMNIST"
    assert results["confusion_matrix"].sum() == 10_000
    assert results["accuracy"] > 0.9
    assert min(results["precision"], results["recall"], results["f1"]) > 0.899
