"""Plain loops in place of the variable-length flash kernels, which run on CUDA only, under the signatures that those
have had. They refuse what the real ones refuse."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


def attend_each(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Causal softmax attention document by document, head by head: [T, H, D], [T, K, D], int32 [n + 1] -> [T, H, D]."""
    assert offsets.dtype == torch.int32 and offsets.ndim == 1 and offsets.is_contiguous()
    bounds = offsets.tolist()
    assert bounds[0] == 0 and bounds[-1] == len(q) == len(k) == len(v)
    assert all(tensor.ndim == 3 and tensor.stride(2) == 1 for tensor in (q, k, v))
    group = q.shape[1] // k.shape[1]
    documents = []
    for start, end in pairwise(bounds):
        assert 0 < end - start <= longest
        future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        heads = []
        for head in range(q.shape[1]):
            scores = q[start:end, head] @ k[start:end, head // group].t() / math.sqrt(q.shape[2])
            heads.append(scores.masked_fill(future, float("-inf")).softmax(dim=1) @ v[start:end, head // group])
        documents.append(torch.stack(heads, dim=1))
    return torch.cat(documents)


def torch_2_10(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: object = None,
) -> Tensor:
    assert is_causal and cu_seq_q is cu_seq_k and max_q == max_k and return_aux is None
    return attend_each(query, key, value, cu_seq_q, max_q)


def torch_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: object = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    assert window_size == (-1, 0) and scale is None
    return torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, True, return_aux)


def _this_torch(
    *arguments: Any, is_causal: bool = False, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False
) -> Tensor:
    assert is_causal or window_size == (-1, 0)
    grouped = arguments[0].shape[1] != arguments[1].shape[1]
    assert enable_gqa == (grouped and "enable_gqa" in inspect.signature(varlen_attn).parameters)
    return torch_2_10(*arguments, is_causal=True)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    assert causal and window_size == (-1, -1) and deterministic == torch.are_deterministic_algorithms_enabled()
    return torch_2_10(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal=True)


STAND_INS: dict[str, Callable[..., Tensor]] = {
    "varlen of torch 2.10": torch_2_10,
    "varlen of torch 2.11": torch_2_11,
    "varlen of this torch": create_autospec(varlen_attn, side_effect=_this_torch),  # calls have to fit its signature
    "flash_attn": flash_attn_varlen_func,
}


def stand_in(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put the stand-in where the kernel is looked for; returns the backend that finds it there."""
    if name == "flash_attn":
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    else:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", STAND_INS[name])
    return name.partition(" ")[0]
