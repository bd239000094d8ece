"""The memory benchmark: its tool against sums by hand, and in small the closed form against training steps."""

from __future__ import annotations

import pytest
import torch

from benchmarks import memory
from benchmarks.memory import Measured, Size, measure_in_new_process, planned
from benchmarks.memory_trace import Stretch, mark, trace
from launch.memory import Layout
from models.config import CausalTransformerConfig, LanguageModelConfig, ModelConfig, VisionConfig

KILOBYTE = 1024


def bytes_of(kilobytes: int) -> torch.Tensor:
    return torch.empty(kilobytes * KILOBYTE, dtype=torch.uint8)


def test_the_tool_counts_tensors_of_known_size() -> None:
    """What lives, what lived between two marks, and what an operation saves for its gradient."""
    before = bytes_of(1)

    def run() -> None:
        nonlocal before
        kept = bytes_of(4)
        mark("first")
        gone = bytes_of(3)
        del gone, before
        another = bytes_of(2)
        mark("second")
        x = torch.ones(KILOBYTE // 4, requires_grad=True)
        y = x.exp()  # saves its result
        mark("third")
        del kept, another
        z = y.exp()  # saves its own
        del x, y
        mark("fourth")
        del z

    assert trace(run) == [
        Stretch("first", 4 * KILOBYTE, 7 * KILOBYTE),
        Stretch("second", 6 * KILOBYTE, 8 * KILOBYTE),
        Stretch("third", 8 * KILOBYTE, 8 * KILOBYTE),
        Stretch("fourth", 3 * KILOBYTE, 3 * KILOBYTE),
    ]


TINY = Size(
    "tiny",
    ModelConfig(
        "tiny",
        VisionConfig(image_size=112, width=96, num_layers=3, num_heads=3, mlp_width=256),
        CausalTransformerConfig(num_queries=16, width=96, num_layers=3, num_heads=3, head_width=32, mlp_width=256),
        LanguageModelConfig(text_vocab_size=500, width=128, num_layers=4, num_heads=4, num_kv_heads=2, mlp_width=320),
    ),
    rows=2,
    seq_len=320,
    images_per_row=6,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        Layout(0, device="cpu"),
        Layout(0, device="cpu", activation_checkpointing="selective", accumulates=True),
        Layout(2, device="cpu", activation_checkpointing="full"),
        Layout(3, device="cpu", precision="bf16"),
    ],
)
def test_the_closed_form_in_small(layout: Layout) -> None:
    measured = measure_in_new_process(TINY, layout)
    rest, forward, top = planned(TINY, layout)
    assert rest.total == pytest.approx(measured.resting, rel=0.02)
    assert forward.total - rest.total == pytest.approx(measured.kept, rel=0.05)
    assert top.total == pytest.approx(measured.peak, rel=memory.TOLERANCE)


def test_exit_code_and_last_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    total = int(planned(TINY, Layout(0, device="cpu"))[2].total)
    monkeypatch.setattr(memory, "SIZES", (TINY,))
    monkeypatch.setattr("sys.argv", ["benchmarks.memory"])
    for factor, ratio, code in ((1.0, "1.000", 0), (1.2, "0.833", 1), (0.85, "1.176", 1)):
        seen = Measured(1000, 1000, int(total * factor))
        monkeypatch.setattr(memory, "measure_in_new_process", lambda size, layout, seen=seen: seen)
        assert memory.main() == code
        assert capsys.readouterr().out.splitlines()[-1] == f"ratios: tiny={ratio}"
