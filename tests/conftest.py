"""What several test files need: the three scripts, tiny data, and the real data where it is."""

import importlib
import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # nets this small gain nothing from two, and beside a busy process lose

PARTS = ["part1_mlp_mnist", "part2_rnn_fashion", "part3_attention"]
WITH_DATA = PARTS[:2]


@pytest.fixture(params=PARTS)
def part(request, monkeypatch, tmp_path):
    """Each script as a module, in an empty folder and without mirrors: no network, no dataset."""
    module = importlib.import_module(request.param)
    monkeypatch.chdir(tmp_path)
    if request.param in WITH_DATA:
        monkeypatch.setattr(module, "MIRRORS", [])
    return module


@pytest.fixture
def data_dir():
    """The folder with the real datasets, from DATA_DIR; the test is skipped without it."""
    if "DATA_DIR" not in os.environ:
        pytest.skip("DATA_DIR is not set")
    torch.set_num_threads(os.cpu_count() or 1)  # whole trainings, on a machine that is theirs
    yield Path(os.environ["DATA_DIR"]).resolve()
    torch.set_num_threads(1)


def small_data(module, n_train=256, n_val=64, n_test=64):
    """Ten noisy prototypes: easy to learn, and made in no time."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(10, 28, 28, generator=generator)

    def split(n):
        labels = torch.randint(10, (n,), generator=generator)
        return prototypes[labels] + 0.5 * torch.randn(n, 28, 28, generator=generator), labels

    splits = [tensor for n in (n_train, n_val, n_test) for tensor in split(n)]
    return module.Data("toy", list("0123456789"), 0.0, 1.0, *splits)


def small_config(module, **settings):
    """A setting that runs in a second."""
    small = {
        "part1_mlp_mnist": {"hidden": (8,), "batch_size": 64, "epochs": 2},
        "part2_rnn_fashion": {"hidden_size": 8, "encoder_size": 8, "batch_size": 64, "epochs": 2},
        "part3_attention": {"d_model": 16, "n_head": 2, "n_kv_head": (2, 1), "kv_latent": (8,),
                            "steps": 30, "batch_size": 16},
    }[module.__name__]  # fmt: skip
    return module.Config(**(small | settings))
