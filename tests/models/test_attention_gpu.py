"""The variable-length flash kernels on a CUDA device against SDPA in fp32 there: pytest -m gpu."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from models.attention import VarlenLayout, pack_layout, packed_causal_attention
from models.attention_backend import FLASH_KERNELS, attention_backend
from tests.models.test_attention import document_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

ROWS = {
    "pages": ([[700, 1300], [1100, 400, -548]], 2048),
    "captions": ([[37, 64, 128, 1, 150, 90, 33], [129, 127, 16, 17, -200, 15]], 701),
    "padding only": ([[-300], [12]], 300),
}
HEADS = [(8, 8, 128), (8, 2, 64), (4, 1, 80)]
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 0.01, 0.02
"""In bf16, of a tensor's norm: rounding to 8 bits costs 0.2 % once and happens to the weights, too. A wrong mask costs
more than 10 %."""


@pytest.fixture(params=["sdpa", *FLASH_KERNELS])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "flash_attn" and not find_spec("flash_attn"):
        pytest.skip("flash_attn is not installed")
    if request.param != "sdpa" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("flash attention needs compute capability 8.0")
    return request.param


def inputs(ids: Tensor, heads: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v: the same numbers, which bf16 can hold, in every dtype."""
    num_heads, num_kv_heads, width = heads
    draw = torch.Generator().manual_seed(0)
    made = (torch.randn(*ids.shape, count, width, generator=draw) for count in (num_heads, num_kv_heads, num_kv_heads))
    return tuple(x.bfloat16().to("cuda", dtype).requires_grad_() for x in made)


def output_and_gradients(ids: Tensor, heads: tuple[int, int, int], dtype: torch.dtype, backend: str) -> list[Tensor]:
    """fp32, at the positions of documents; the gradients everywhere."""
    q, k, v = inputs(ids, heads, dtype)
    output = packed_causal_attention(q, k, v, pack_layout(ids.cuda(), backend))[ids.cuda() > 0]
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    return [x.float() for x in (output, *torch.autograd.grad(output, (q, k, v), upstream))]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """By norm."""
    assert actual.isfinite().all()
    assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", ROWS)
def test_agrees_with_sdpa_in_fp32(case: str, heads: tuple[int, int, int], dtype: torch.dtype, backend: str) -> None:
    """Outputs within 1 % of their norm, gradients of q, k and v within 2 %; padding has no gradient."""
    ids = document_ids(*ROWS[case])
    expected, *expected_gradients = output_and_gradients(ids, heads, torch.float32, "sdpa")
    actual, *gradients = output_and_gradients(ids, heads, dtype, backend)
    assert_close(actual, expected, OUTPUT_TOLERANCE)
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert_close(one, other, GRADIENT_TOLERANCE)
        assert not one[ids.cuda() == 0].any()


def test_sdpa_in_fp32_agrees_with_the_cpu() -> None:
    """Within 1e-4 of the norm: the oracle of the other tests is right on the device, too."""
    ids, heads = document_ids(*ROWS["captions"]), (8, 2, 64)
    q, k, v = (x.detach().cpu() for x in inputs(ids, heads, torch.float32))
    expected = packed_causal_attention(q, k, v, pack_layout(ids))[ids > 0]
    assert_close(output_and_gradients(ids, heads, torch.float32, "sdpa")[0].cpu(), expected, 1e-4)


def test_no_layer_waits_for_the_device(backend: str) -> None:
    """Forward and backward; making the layout waits, once a batch."""
    ids, heads = document_ids(*ROWS["captions"]), (8, 2, 64)
    layout = pack_layout(ids.cuda(), backend)
    q, k, v = inputs(ids, heads, torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed_causal_attention(q, k, v, layout).float().square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_scores_are_held(backend: str) -> None:
    """One document of 8192 positions, SDPA in fp32: forward and backward take less than a quarter of all scores."""
    ids, heads = torch.ones(1, 8192, dtype=torch.int32), (8, 2, 64)
    q, k, v = inputs(ids, heads, torch.float32 if backend == "sdpa" else torch.bfloat16)
    layout = pack_layout(ids.cuda(), backend)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    packed_causal_attention(q, k, v, layout).sum().backward()
    scores = 8192 * 8192 * 8 * q.itemsize
    assert torch.cuda.max_memory_allocated() - before < scores / 4


@pytest.mark.parametrize("name", FLASH_KERNELS)
def test_deterministic_algorithms_give_the_same_gradients_twice(name: str) -> None:
    if name == "flash_attn" and not find_spec("flash_attn"):
        pytest.skip("flash_attn is not installed")
    ids, heads = document_ids(*ROWS["pages"]), (8, 2, 64)
    layout = pack_layout(ids.cuda(), name)
    assert isinstance(layout, VarlenLayout)
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            q, k, v = (x.detach().flatten(0, 1).requires_grad_() for x in inputs(ids, heads, torch.bfloat16))
            output = layout.kernel(q, k, v, layout.offsets, layout.longest)
            found.append(torch.autograd.grad(output, (q, k, v), torch.ones_like(output)))
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_auto_takes_a_flash_kernel_where_it_can() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("flash attention needs compute capability 8.0")
    device = torch.device("cuda")
    assert attention_backend("auto", device, torch.bfloat16, 128) in FLASH_KERNELS
    assert attention_backend("auto", device, torch.float32, 128) == "sdpa"
