"""The mistakes that the page warns of, made on purpose: `python tests/mistakes.py`.

Every one is made in a copy of the project; the test named beside it has to fail there. Rows of
the page that cannot be made so: a device that is never used (it needs a GPU), the best of many
test scores (there is only one), padding (our sequences are equally long).
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ONE, TWO, THREE = "part1_mlp_mnist.py", "part2_rnn_fashion.py", "part3_attention.py"
MISTAKES = {  # what goes wrong: (script, the right text, the wrong one, the test that sees it)
    "metrics of the last batch only": (
        ONE, "torch.cat([model(batch) for batch in images.split(5000)])",
        "[model(batch) for batch in images.split(5000)][-1]",
        "test_part1.py::test_every_image_is_predicted_and_nothing_is_recorded"),
    "drop_last at test time": (
        ONE, "images.split(5000)", "images[: len(images) // 5000 * 5000].split(5000)",
        "test_part1.py::test_every_image_is_predicted_and_nothing_is_recorded"),
    "0/0 in F1": (
        ONE, "right / predicted.clip(min=1)", "right / predicted",
        "test_scripts.py -k test_scores_equal"),
    "rows and columns of the matrix exchanged": (
        ONE, "np.add.at(matrix, (labels, predictions), 1)",
        "np.add.at(matrix, (predictions, labels), 1)", "test_scripts.py -k test_scores_equal"),
    "the other dataset's normalisation": (
        ONE, "std, mean = (x.item() for x in torch.std_mean(pixels))",
        "std, mean = 0.3081 * 255, 0.1307 * 255", "test_part1.py -k test_splits_are"),
    "validation images normalised otherwise": (
        ONE, "(images[val] - mean) / std", "(images[val] + mean) / std",
        "test_part1.py -k test_splits_are"),
    "training data never shuffled": (
        ONE, "torch.randperm(n, device=device)", "torch.arange(n, device=device)",
        "test_part1.py -k test_an_epoch_takes"),
    "no zero_grad": (
        ONE, "        adamw.zero_grad()\n", "", "test_part1.py -k test_each_step_uses"),
    "softmax before cross_entropy": (
        ONE, "return self.layers(x.flatten(1))", "return self.layers(x.flatten(1)).softmax(1)",
        "test_part1.py -k test_mlp_equals"),
    "no ReLU between the layers": (
        ONE, "nn.ReLU(), ", "nn.Identity(), ", "test_part1.py -k test_mlp_equals"),
    "no eval() when scoring": (
        TWO, "    model.eval()\n", "", "test_part2.py -k test_dropout_is_off"),
    "no train() after scoring": (
        ONE, "    model.train()\n", "", "test_part1.py -k test_an_epoch_takes"),
    "no no_grad() when scoring": (
        ONE, "@torch.no_grad()\ndef predict", "def predict",
        "test_part1.py::test_every_image_is_predicted_and_nothing_is_recorded"),
    "the last epoch kept instead of the best": (
        ONE, "if (val_accuracy, -val_loss) > best:", "if True:", "test_part1.py -k test_the_best"),
    "a sum that is called accuracy": (
        ONE, "(logits.argmax(1) == data.val_labels).float().mean()",
        "(logits.argmax(1) == data.val_labels).float().sum()", "test_part1.py -k test_the_best"),
    "an RNN without W_hh": (
        TWO, "torch.tanh(p + F.linear(h, W_hh, b_hh))", "torch.tanh(p + b_hh)",
        "test_part2.py -k test_values_states"),
    "the state carried to the next batch": (
        TWO, "h = c = x.new_zeros(x.shape[1], W_hh.shape[1])",
        "h = c = self.__dict__.setdefault('kept', torch.rand(1)) + x.new_zeros(x.shape[1], "
        "W_hh.shape[1]); self.kept = x.mean().detach()", "test_part2.py -k test_state_is_fresh"),
    "the whole image in one step": (
        TWO, "x.unfold(1, self.rows, self.config.rows_per_step)", "x.unfold(1, 28, 28)",
        "test_part2.py -k test_rows_are_read"),
    "the reset gate before the product": (
        TWO, "n = torch.tanh(p_n + r * q_n)", "n = torch.tanh(r * p_n + q_n)",
        "test_part2.py -k test_values_states"),
    "an LSTM that forgets what it should keep": (
        TWO, "torch.sigmoid(f) * c +", "(1 - torch.sigmoid(f)) * c +",
        "test_part2.py -k test_values_states"),
    "no clipping": (
        TWO, "        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)\n", "",
        "test_part2.py -k test_a_long_gradient"),
    "clipping before backward": (
        TWO, "        loss.backward()\n        nn.utils.clip_grad_norm_(model.parameters(), "
        "config.clip_norm)\n", "        nn.utils.clip_grad_norm_(model.parameters(), "
        "config.clip_norm)\n        loss.backward()\n", "test_part2.py -k test_a_long_gradient"),
    "heads cut across tokens": (
        THREE, "x.view(B, T, n_head, -1).transpose(1, 2)", "x.view(B, n_head, T, -1)",
        "test_part3.py -k test_heads_are_cut"),
    "heads merged with the wrong transpose": (
        THREE, "output.transpose(1, 2).flatten(2)",
        "output.reshape(output.shape[0], output.shape[2], -1)",
        "test_part3.py -k test_module_equals_torch"),
    "no softmax": (
        THREE, "weights = exp / exp.sum(-1, keepdim=True)", "weights = scores",
        "test_part3.py -k test_values_and_gradients"),
    "no scaling": (
        THREE, "q = q / math.sqrt(d) if scale", "q = q if scale",
        "test_part3.py -k test_values_and_gradients"),
    "queries summed and called MQA": (
        THREE, "        return q, k, split_heads(self.v_proj(x), self.n_kv_head)",
        "        q = q.sum(1, keepdim=True).expand_as(q)\n"
        "        return q, k, split_heads(self.v_proj(x), self.n_kv_head)",
        "test_part3.py -k test_modules_equal"),
    "mask times a tiny number": (
        THREE, "scores.masked_fill(~mask, -math.inf)", "scores + ~mask * -1e-9",
        "test_part3.py -k test_causal_mask"),
    "several cached tokens with the mask of the first ones": (
        THREE, "self.causal[start:end, :end]", "self.causal[: end - start, :end]",
        "test_part3.py -k test_answers_from_the_cache"),
    "a label that does not need the lookups' order": (
        THREE, "FACTORS = (1, 3, 7)", "FACTORS = (1, 1, 1)",
        "test_part3.py -k test_labels_equal"),
    "own digits as they are": (
        ONE, "    photo = open_photo(path)\n",
        "    return torch.tensor(np.asarray(open_photo(path).resize((28, 28))))\n",
        "test_photos.py"),
    "a folder that cannot be written, told after training": (
        ONE, "    check_writable(config.images_dir", "    lambda: check_writable(config.images_dir",
        "test_faults.py -k test_what_cannot_be_written"),
}  # fmt: skip


def run_test(folder: str, test: str) -> None:
    """In a process of its own: run a test of the copy in `folder`; the exit status is pytest's."""
    import pytest

    os.chdir(folder)
    sys.path.insert(0, folder)
    os.environ.pop("DATA_DIR", None)
    name, *options = test.split()
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", f"tests/{name}", *options]))


def seen(script: str, right: str, wrong: str, test: str) -> bool:
    """Whether the test passes as it stands and fails with the mistake."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "tests", Path(folder, "tests"))
        for path in (*ROOT.glob("part*.py"), ROOT / "pyproject.toml"):
            shutil.copy(path, folder)
        text = Path(folder, script).read_text(encoding="utf-8")
        if right not in text:
            raise SystemExit(f"{script} does not hold {right!r} any more")
        Path(folder, script).write_text(text.replace(right, wrong), encoding="utf-8")
        process = multiprocessing.get_context("fork").Process(target=run_test, args=(folder, test))
        process.start()
        process.join(120)
        process.kill()
        return process.exitcode == 1  # 1: a test failed; 0: none did; others: none was run


if __name__ == "__main__":
    # What the tests need is imported once; every mistake gets a fork of this process.
    import matplotlib.figure  # noqa: F401
    import pytest  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch
    import tyro  # noqa: F401

    torch.set_num_threads(1)
    missed = [name for name, mistake in MISTAKES.items() if not seen(*mistake)]
    print(f"mistakes: {len(MISTAKES) - len(missed)} caught, of {len(MISTAKES)}")
    for name in missed:
        print(f"  not seen: {name}")
    sys.exit(bool(missed))
