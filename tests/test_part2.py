"""Part 2: the cells against torch.nn's, the net, its training, and its quality."""

import pytest
import torch
import torch.nn.functional as F
from conftest import small_config, small_data
from torch.nn.utils import parameters_to_vector
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel

import part2_rnn_fashion as part2

TORCHS = {"tanh": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}
each_cell = pytest.mark.parametrize("cell", TORCHS)


def weights(layer):
    """In the order of nn.RNN's parameters."""
    return [layer.W_ih.weight, layer.W_hh.weight, layer.W_ih.bias, layer.W_hh.bias]


def copy_weights(own, reference):
    for weight, torchs in zip(own, reference.parameters(), strict=True):
        torchs.data.copy_(weight.detach())


@each_cell
@pytest.mark.parametrize("case", range(25))
def test_states_and_gradients_equal_torchs(cell, case):
    torch.manual_seed(case)
    T, B, E, H = torch.randint(1, 10, (4,)).tolist()
    layer = part2.RecurrentLayer(E, H, cell, orthogonal=False).double()
    reference = TORCHS[cell](E, H).double()
    copy_weights(weights(layer), reference)
    x = torch.randn(T, B, E, dtype=torch.float64, requires_grad=True)
    states = layer(x)
    expected, _ = reference(x)
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-9)
    direction = torch.randn_like(states)
    gradients = torch.autograd.grad(states, [x, *weights(layer)], direction)
    expected = torch.autograd.grad(expected, [x, *reference.parameters()], direction)
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-9)


@each_cell
def test_a_state_sees_earlier_rows_and_no_later_ones(cell):
    torch.manual_seed(0)
    layer = part2.RecurrentLayer(3, 5, cell, orthogonal=True)
    x = torch.randn(8, 2, 3)
    before = layer(x)
    x[4] += 1
    moved = (layer(x) - before).abs().amax((1, 2)) > 0
    assert moved.tolist() == [False] * 4 + [True] * 4


@each_cell
def test_the_state_weights_start_orthogonal_or_all_start_as_torchs_do(cell):
    layer = part2.RecurrentLayer(5, 16, cell, orthogonal=True)
    for block in layer.W_hh.weight.detach().split(16):
        torch.testing.assert_close(block @ block.T, torch.eye(16), rtol=0, atol=1e-5)
    layer = part2.RecurrentLayer(3, 100, cell, orthogonal=False)
    for weight in weights(layer):
        assert 0.09 < weight.abs().max() <= 0.1  # 1 / sqrt(100)


@pytest.mark.parametrize("rows_per_step", [1, 4, 28])
@pytest.mark.parametrize("readout", ["last", "pool"])
@pytest.mark.parametrize("both_ways", [False, True])
def test_the_net_is_torchs_rnn_between_encoder_and_classifier(rows_per_step, readout, both_ways):
    torch.manual_seed(0)
    settings = {"rows_per_step": rows_per_step, "readout": readout, "bidirectional": both_ways}
    model = part2.RowRNN(small_config(part2, **settings))
    reference = torch.nn.RNN(8, 8, bidirectional=both_ways)
    up = weights(model.up) if both_ways else []
    copy_weights(weights(model.down) + up, reference)
    images = torch.randn(3, 28, 28)
    steps = [rows.flatten(1) for rows in images.split(rows_per_step, dim=1)]
    states, ends = reference(torch.stack([model.encoder(step) for step in steps]))
    seen = torch.cat([*ends], 1)  # of each direction the state that has seen every row
    if readout == "pool":
        seen = torch.cat([states.mean(0), states.max(0).values], 1)
    torch.testing.assert_close(model(images), model.classifier(seen))


@each_cell
def test_the_state_is_fresh_for_every_batch(cell):
    torch.manual_seed(0)
    model = part2.RowRNN(small_config(part2, cell=cell, bidirectional=True)).eval()
    images = torch.randn(20, 28, 28)
    together = model(images)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone)


def test_it_can_learn_64_random_labels_by_heart():
    torch.manual_seed(0)
    split = part2.Split(torch.randn(64, 28, 28), torch.randint(10, (64,)))
    data = small_data(part2)._replace(train=split, val=split)
    config = part2.Config(hidden_size=64, epochs=60, batch_size=32, lr=5e-3, mirror=False)
    _, best = part2.train(part2.RowRNN(config), data, config)
    assert best["val_accuracy"] == 1


def test_dropout_is_off_in_every_validation_and_on_in_every_step():
    modes = []
    config = small_config(part2, batch_size=128, dropout=0.5)
    model = part2.RowRNN(config)
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    part2.train(model, small_data(part2), config)
    assert modes == [True, True, False] * 2  # validation runs a copy, with the same hook


def test_a_long_gradient_is_clipped_and_a_short_one_is_not():
    """A step of plain gradient descent at a rate of 1 is as long as the gradient."""
    data = small_data(part2)
    lengths = []
    for clip_norm in (0.001, 1e6):
        config = small_config(part2, batch_size=256, clip_norm=clip_norm, lr=1)
        model = part2.RowRNN(config)
        before = parameters_to_vector(model.parameters())
        part2.train_epoch(model, AveragedModel(model), data, config, SGD(model.parameters()), 1)
        lengths.append((parameters_to_vector(model.parameters()) - before).norm().item())
    assert lengths[0] == pytest.approx(0.001, rel=1e-3)
    assert 0.1 < lengths[1] < 10


def test_the_running_mean_of_the_weights_is_validated_and_kept():
    """Two epochs of two steps: a mean over half of the four takes one half of each new step."""
    seen = []
    data = small_data(part2)
    config = small_config(part2, batch_size=128, ema=0.5)
    model = part2.RowRNN(config)
    model.register_forward_pre_hook(lambda net, _: seen.append(net.encoder[0].bias.clone()))
    _, best = part2.train(model, data, config)
    _, after_1, validated, after_2, *_ = seen
    torch.testing.assert_close(validated, (after_1 + after_2) / 2)
    logits = part2.predict(model, data.val.images)
    assert best["val_loss"] == F.cross_entropy(logits, data.val.labels).item()


@pytest.mark.parametrize(("mirror", "share"), [(True, 0.5), (False, 0)])
def test_half_of_the_images_are_mirrored_in_training_if_that_is_wanted(mirror, share):
    seen = []
    config = small_config(part2, batch_size=1000, mirror=mirror)
    data = small_data(part2, n_train=1000)
    model = part2.RowRNN(config)
    model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    part2.train_epoch(model, AveragedModel(model), data, config, SGD(model.parameters()), 1)
    originals = {image.numpy().tobytes() for image in data.train.images}
    turned = [image for image in seen if image.numpy().tobytes() not in originals]
    assert all(image.flip(1).numpy().tobytes() in originals for image in turned)
    assert len(turned) / len(seen) == pytest.approx(share, abs=0.07)


def test_the_belief_after_a_row_knows_no_later_row_and_the_last_is_the_answer():
    data = small_data(part2)
    model = part2.RowRNN(small_config(part2, bidirectional=True))
    probabilities = part2.predict(model, data.test.images).softmax(1)
    before = part2.belief_figure(model, data, probabilities, "").axes[1].images[0].get_array()
    data.test.images[0, 20:] += 1
    after = part2.belief_figure(model, data, probabilities, "").axes[1].images[0].get_array()
    assert abs(before[:, -1] - probabilities[0].numpy()).max() < 1e-5
    assert (after == before).all(0).tolist() == [True] * 20 + [False] * 8


def test_quality_gate(data_dir, tmp_path):
    results = part2.main(part2.Config(data_dir=data_dir, images_dir=tmp_path, device="cpu"))
    assert results["dataset"] == "FashionMNIST"
    assert results["confusion_matrix"].sum() == 10_000
    assert min(results[name] for name in ("accuracy", "precision", "recall", "f1")) > 0.897
