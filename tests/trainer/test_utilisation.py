"""What a step has to compute."""

from __future__ import annotations

from models.flops import forward_flops
from tests.distributed.parity import batch_by_hand, rows_of_step
from tests.models.tiny_emu import tiny_config
from trainer.utilisation import document_lengths, peak_flops, step_flops


def test_a_step_counts_documents_not_padding() -> None:
    batches = [batch_by_hand(0, 0, 2), batch_by_hand(0, 2, 4)]
    lengths = [len(document.ids) for row in rows_of_step(0) for document in row]
    assert [length for batch in batches for length in document_lengths(batch)] == lengths
    assert step_flops(tiny_config(), batches, 11, 8) == 3 * forward_flops(tiny_config(), lengths, 7, 11, 8)


def test_devices() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("cpu") is None
