"""The closed form against torch's own counter of operations."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.attention import LENGTH_STEP
from models.flops import causal_transformer_flops, forward_flops, language_model_flops, vision_encoder_flops
from tests.models.tiny_emu import BOS, EOS, NUM_QUERIES, PICTURE, TEXT_VOCAB, Doc, lay_out, tiny_config, tiny_emu


def counted(model: torch.nn.Module, inputs: dict[str, object]) -> Counter[str]:
    """Operations by top-level module."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # the only one that it counts on a CPU
        model(**inputs)
    counts = counter.get_flop_counts()
    return Counter({name.removeprefix("Emu."): sum(ops.values()) for name, ops in counts.items()})


def test_a_batch() -> None:
    """torch counts the unused half of causal attention too, and the language model's documents are padded to steps."""
    lengths = [2 * LENGTH_STEP, LENGTH_STEP]
    words = [5] * (lengths[0] - 2 - len(PICTURE))
    rows = [[Doc([BOS, *words, *PICTURE, EOS]), Doc([BOS, *[6] * (lengths[1] - 2), EOS])]]
    model, config = tiny_emu(), tiny_config()
    by_module = counted(model, lay_out(rows, sum(lengths)) | {"text_scale": 1.0, "image_scale": 1.0})

    vision, causal, language = config.vision, config.causal_transformer, config.language_model
    assert by_module["vision_encoder"] == vision_encoder_flops(vision)
    unused = 2 * causal.num_layers * NUM_QUERIES**2 * causal.num_heads * causal.head_width
    assert by_module["causal_transformer"] == causal_transformer_flops(causal, vision, language.width) + unused
    width = language.num_heads * language.width_of_head
    unused_in_language_model = 2 * language.num_layers * width * sum(length**2 for length in lengths)
    assert by_module["language_model"] == language_model_flops(language, lengths) + unused_in_language_model
    num_text = len(words) + 1 + lengths[1] - 1
    total = forward_flops(config, lengths, 1, num_text, NUM_QUERIES + 1)
    assert by_module["Emu"] == total + unused + unused_in_language_model
    assert language.vocabulary == TEXT_VOCAB + 4


def test_fewer_key_and_value_heads_cost_less() -> None:
    language = tiny_config().language_model
    full = replace(language, num_kv_heads=language.num_heads)
    width = language.width * 2 * (language.num_heads - language.num_kv_heads) * language.width_of_head
    assert language_model_flops(full, [7]) - language_model_flops(language, [7]) == 2 * language.num_layers * 7 * width
