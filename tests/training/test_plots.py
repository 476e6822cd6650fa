"""The plots: what is drawn is what was given, labelled with units, in a file that is whole or absent."""

import struct

import pytest

from peft_caft.basics import plots as look
from peft_caft.training import plots
from peft_caft.training.plots import plot_training

LORA = [{"step": step, "loss": 3.0 / step} for step in range(1, 11)]


CAFT = [
    {
        "step": step,
        "loss": 3.0 / step + 0.01 * (1 - step / 10) * 8.0,  # the next token's part is that of LORA
        "caft/gamma": 1 - step / 10,
        "caft/aux_loss": 8.0,
        "caft/loss_head_2": 5.0,
        "caft/loss_head_10": 7.0,
    }
    for step in range(1, 11)
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures, instead of the files."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    return figures


@pytest.mark.parametrize(
    ("draw", "size"),
    [
        (lambda path: plot_training(path, {"LoRA": LORA}), (1200, 660)),
        (lambda path: plot_training(path, {"LoRA": LORA, "CAFT": CAFT}), (1200, 1200)),
    ],
)
def test_writes_a_png_with_150_dots_per_inch(tmp_path, draw, size):
    path = tmp_path / "new folder" / "plot.png"
    draw(path)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == size
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_drawing_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "plot.png"
    path.write_text("old")

    def savefig(figure, file, **kwargs):
        file.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(look.Figure, "savefig", savefig)
    with pytest.raises(OSError, match="disk full"):
        plot_training(path, {"LoRA": LORA})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_runs_are_compared_by_their_next_token_loss(drawn):
    plot_training("plot.png", {"LoRA": LORA, "CAFT": CAFT})
    axes = drawn[0].axes[0]
    lora, caft = [line for line in axes.get_lines() if line.get_label() in ("LoRA", "CAFT")]
    assert caft.get_ydata() == pytest.approx(lora.get_ydata())
    assert lora.get_ydata() == pytest.approx([entry["loss"] for entry in LORA])
    assert lora.get_color() != caft.get_color()


def test_the_weight_of_the_auxiliary_loss_can_be_another(drawn):
    plot_training("plot.png", {"CAFT": CAFT}, aux_loss_weight=0.0)
    assert drawn[0].axes[0].get_lines()[0].get_ydata() == pytest.approx([entry["loss"] for entry in CAFT])


def test_gamma_and_every_head_are_drawn(drawn):
    plot_training("plot.png", {"LoRA": LORA, "CAFT": CAFT})
    upper, lower, right = drawn[0].axes
    assert [line.get_label() for line in lower.get_lines()] == ["2 tokens ahead", "10 tokens ahead"]
    assert [line.get_ydata()[0] for line in lower.get_lines()] == [5.0, 7.0]
    (gamma,) = right.get_lines()
    assert list(gamma.get_ydata()) == [entry["caft/gamma"] for entry in CAFT]
    assert upper.get_ylabel() == lower.get_ylabel() == "cross entropy (nats/token)"
    assert upper.get_xlabel() == lower.get_xlabel() == "optimizer step"
    assert right.get_ylabel().startswith("gamma")


def test_entries_without_a_training_loss_are_left_out(drawn):
    others = [{"step": 10, "eval_loss": 99.0}, {"step": 10, "train_loss": 99.0, "train_runtime": 1.0}]
    plot_training("plot.png", {"LoRA": [*LORA, *others]})
    assert list(drawn[0].axes[0].get_lines()[0].get_xdata()) == list(range(1, 11))


def test_the_running_mean_does_not_lag():
    values = [float(step) for step in range(100)]
    assert plots._running_mean(values)[10:90] == pytest.approx(values[10:90])
    assert plots._running_mean([0.0, 40.0] * 50)[50] == pytest.approx(16.0)  # of 0 40 0 40 0


@pytest.mark.parametrize("runs", [{}, {"LoRA": []}, {"LoRA": LORA, "CAFT": [{"step": 1, "eval_loss": 1.0}]}])
def test_a_run_without_a_loss_is_refused(runs):
    with pytest.raises(ValueError, match=r"runs: got .* expected at least one"):
        plot_training("plot.png", runs)
