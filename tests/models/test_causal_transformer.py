"""CausalTransformer against transformers' T5 decoder stack, its cross-attention widened to the vision width."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Stack

from models.causal_transformer import CausalTransformer

VISION_WIDTH, WIDTH, HEADS, HEAD_WIDTH, MLP_WIDTH, LAYERS, OUTPUT_WIDTH = 24, 16, 2, 12, 40, 3, 20
OUR_TO_T5 = {
    "self_norm": "layer.0.layer_norm",
    "self_attention": "layer.0.SelfAttention",
    "cross_norm": "layer.1.layer_norm",
    "cross_attention": "layer.1.EncDecAttention",
    "mlp_norm": "layer.2.layer_norm",
    "mlp": "layer.2.DenseReluDense",
}


def causal_transformer(
    num_queries: int, buckets: int = 32, max_distance: int = 128, dropout: float = 0.0
) -> CausalTransformer:
    """Inner attention width (2 x 12) differs from the width; norms and biases are drawn away from their plain start."""
    model = CausalTransformer(
        VISION_WIDTH,
        OUTPUT_WIDTH,
        num_queries=num_queries,
        width=WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        head_width=HEAD_WIDTH,
        mlp_width=MLP_WIDTH,
        position_buckets=buckets,
        position_max_distance=max_distance,
        norm_eps=1e-6,
        dropout=dropout,
    )
    nn.init.normal_(model.queries)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.2)
    nn.init.normal_(model.relative_attention_bias.weight)
    nn.init.normal_(model.projection.bias)
    return model


def t5_stack(model: CausalTransformer, buckets: int, max_distance: int) -> T5Stack:
    """T5's decoder with the weights of `model`, every one used."""
    config = T5Config(
        vocab_size=4,
        d_model=WIDTH,
        d_kv=HEAD_WIDTH,
        d_ff=MLP_WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=max_distance,
        dropout_rate=0.0,
        layer_norm_epsilon=1e-6,
        feed_forward_proj="relu",
        is_decoder=True,
        is_encoder_decoder=False,
        use_cache=False,
    )
    stack = T5Stack(config).eval()
    for block in stack.block:
        for name in ("k", "v"):
            setattr(block.layer[1].EncDecAttention, name, nn.Linear(VISION_WIDTH, HEADS * HEAD_WIDTH, bias=False))
    left_over = stack.load_state_dict(dict(t5_names(model)), strict=False)
    assert left_over.unexpected_keys == [] and left_over.missing_keys == ["embed_tokens.weight"]
    return stack


def t5_names(model: CausalTransformer) -> list[tuple[str, Tensor]]:
    """Our weights under T5's names; the queries and the projection are Emu's own."""
    renamed = []
    for name, value in model.state_dict().items():
        if name.startswith("blocks."):
            _, number, module, rest = name.split(".", 3)
            renamed.append((f"block.{number}.{OUR_TO_T5[module]}.{rest}", value))
        elif name == "relative_attention_bias.weight":
            renamed.append(("block.0.layer.0.SelfAttention.relative_attention_bias.weight", value))
        elif name == "final_norm.weight":
            renamed.append(("final_layer_norm.weight", value))
    return renamed


@pytest.mark.parametrize(
    ("num_queries", "buckets", "max_distance"),
    [
        pytest.param(32, 32, 128, id="Emu's 32 queries"),
        pytest.param(45, 8, 20, id="beyond the last bucket"),
        pytest.param(1, 32, 128, id="one query"),
    ],
)
def test_equals_t5_decoder(num_queries: int, buckets: int, max_distance: int) -> None:
    """Outputs and gradients with respect to the vision tokens within 1e-5."""
    model = causal_transformer(num_queries, buckets, max_distance)
    stack = t5_stack(model, buckets, max_distance)
    vision_tokens = torch.randn(3, 17, VISION_WIDTH, requires_grad=True)
    actual = model(vision_tokens)
    decoded = stack(inputs_embeds=model.queries.expand(3, -1, -1), encoder_hidden_states=vision_tokens)
    expected = model.projection(decoded.last_hidden_state)
    assert actual.shape == (3, num_queries, OUTPUT_WIDTH)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)

    upstream = torch.randn_like(actual)
    (one,) = torch.autograd.grad(actual, vision_tokens, upstream)
    (other,) = torch.autograd.grad(expected, vision_tokens, upstream)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_query_sees_only_earlier_queries() -> None:
    """d output i / d query j is exactly 0 for j > i and not 0 for j <= i."""
    model = causal_transformer(6)
    vision_tokens = torch.randn(1, 5, VISION_WIDTH)
    output = model(vision_tokens)
    for i in range(6):
        (gradient,) = torch.autograd.grad(output[0, i].sum(), model.queries, retain_graph=True)
        reached = gradient[0].abs().sum(dim=1)
        assert (reached[: i + 1] > 0).all()
        assert torch.equal(reached[i + 1 :], torch.zeros(5 - i))


def test_every_query_sees_every_vision_token() -> None:
    model = causal_transformer(4)
    vision_tokens = torch.randn(1, 9, VISION_WIDTH, requires_grad=True)
    output = model(vision_tokens)
    for i in range(4):
        (gradient,) = torch.autograd.grad(output[0, i].sum(), vision_tokens, retain_graph=True)
        assert (gradient[0].abs().sum(dim=1) > 0).all()


def test_images_do_not_mix() -> None:
    """An image alone gives what it gives in a batch, within 1e-6."""
    model = causal_transformer(5)
    vision_tokens = torch.randn(3, 7, VISION_WIDTH)
    torch.testing.assert_close(model(vision_tokens)[1:2], model(vision_tokens[1:2]), rtol=0, atol=1e-6)


def test_dropout_is_drawn_per_image_and_off_in_evaluation() -> None:
    """As in T5, two equal images get different masks already on their queries."""
    model = causal_transformer(5, dropout=0.5)
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    model(torch.randn(1, 7, VISION_WIDTH).expand(2, -1, -1))
    assert not torch.equal(seen[0][0], seen[0][1])

    model = causal_transformer(5, dropout=0.5).eval()
    vision_tokens = torch.randn(2, 7, VISION_WIDTH)
    assert torch.equal(model(vision_tokens), model(vision_tokens))
