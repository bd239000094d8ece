"""Two tensor-parallel ranks give what one process gives, values and gradients: head, language model, images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor, nn

from models import text_head
from models.config import LanguageModelConfig
from models.language_model import LanguageModel, Parallelism
from models.tensor_parallel import gather_images, sum_gradients
from models.text_head import VocabParallelCrossEntropy
from tests.distributed.harness import run_distributed

TP, VOCAB, WIDTH = 2, 24, 16
CONFIG = LanguageModelConfig(
    text_vocab_size=VOCAB - 4, width=WIDTH, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=20, init_std=0.2
)
PARALLELISMS = {
    "language model": Parallelism(),
    "recomputed": Parallelism(recompute="full"),
    "partly recomputed": Parallelism(recompute="selective"),
    "sequence parallel": Parallelism(sequence=True),
    "sequence parallel, recomputed": Parallelism(sequence=True, recompute="full"),
    "sequence parallel, partly recomputed": Parallelism(sequence=True, recompute="selective"),
}
SHARDED = "sharded: "
Results = dict[str, dict[str, Tensor]]


def head_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, whole weight, labels in both halves of the vocabulary, upstream gradient."""
    draw = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(9, WIDTH, generator=draw), torch.randn(VOCAB, WIDTH, generator=draw)
    return hidden, weight, torch.randint(VOCAB, (9,), generator=draw), torch.randn(9, generator=draw)


def language_model_results(parallelism: Parallelism) -> dict[str, Tensor]:
    """Hidden states of two packed documents, and the gradient of every parameter."""
    torch.manual_seed(5)
    model = LanguageModel(CONFIG, parallelism)
    if parallelism.sequence:
        sum_gradients(model.norms(), parallel_state.get_tensor_model_parallel_group())
    ids = torch.arange(14).view(1, 14) % VOCAB
    documents = torch.tensor([[1] * 6 + [2] * 8], dtype=torch.int32)
    positions = torch.tensor([[*range(6), *range(8)]])
    hidden = model(model.embed_tokens(ids), documents, positions)
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    results = {"hidden states": hidden.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if isinstance(parameter, nn.Parameter) and getattr(parameter, "tensor_model_parallel", False):
            results[SHARDED + name] = parameter.grad.movedim(parameter.partition_dim, 0)  # type: ignore[attr-defined]
        else:
            results[name] = parameter.grad
    return results


def image_results(rank: int, tp_size: int) -> dict[str, Tensor]:
    """Embeddings of five images, four of the first rank and one of the second; the gradient of their encoder."""
    weight = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    images, upstream = torch.arange(15.0).view(5, 3) / 7, torch.arange(20.0).view(5, 4)
    counts = [4, 1] if tp_size > 1 else [5]
    group = parallel_state.get_tensor_model_parallel_group()
    if tp_size > 1:
        sum_gradients([weight], group)
    z = gather_images(images.split(counts)[rank] @ weight, counts, group)
    (z * upstream).sum().backward()
    assert weight.grad is not None
    return {"embeddings": z.detach(), "gradient of the encoder": weight.grad}


def results_of_rank() -> Results:
    """What one tensor-parallel rank computes; of sharded tensors its own rows."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=TP)
    # megatron-core makes the buffers of sequence parallelism on the current CUDA device; here that is the CPU.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    text_head.CHUNK_LOGITS = 4 * VOCAB // TP
    rank = parallel_state.get_tensor_model_parallel_rank()
    hidden, weight, labels, upstream = head_case()
    rows = weight.chunk(TP)[rank].clone().requires_grad_()
    hidden.requires_grad_()
    losses = VocabParallelCrossEntropy.apply(hidden, rows, labels, parallel_state.get_tensor_model_parallel_group())
    losses.backward(upstream)
    head = {"losses": losses.detach(), "gradient of hidden": hidden.grad, SHARDED + "gradient of the head": rows.grad}
    models = {name: language_model_results(parallelism) for name, parallelism in PARALLELISMS.items()}
    return {"head": head, "images": image_results(rank, TP), **models}  # type: ignore[dict-item]


def results_of_one_process() -> Results:
    """The head by plain cross-entropy, the language model without tensor parallelism."""
    hidden, weight, labels, upstream = head_case()
    hidden.requires_grad_()
    weight.requires_grad_()
    losses = F.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    losses.backward(upstream)
    head = {"losses": losses.detach(), "gradient of hidden": hidden.grad, SHARDED + "gradient of the head": weight.grad}
    model = language_model_results(Parallelism())
    return {"head": head, "images": image_results(0, 1), **dict.fromkeys(PARALLELISMS, model)}  # type: ignore[dict-item]


@pytest.fixture(scope="module")
def ranks() -> list[Results]:
    return run_distributed(results_of_rank, TP)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["head", "images", *PARALLELISMS])
def test_two_ranks_equal_one_process(ranks: list[Results], part: str) -> None:
    """Within 1e-5: whole results on both ranks, sharded ones side by side."""
    for name, expected in results_of_one_process()[part].items():
        found = [rank[part][name] for rank in ranks]
        for actual in [torch.cat(found)] if name.startswith(SHARDED) else found:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, msg=name)
