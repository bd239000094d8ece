"""Checkpoints in the published layouts, small and random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

WIDTH, VISION_WIDTH, T5_WIDTH, QUERIES, VOCABULARY = 32, 16, 12, 3, 24
LAYERS = 2


def save_llama(folder: Path, model_class: type = LlamaForCausalLM, **changes: Any) -> Any:
    """A Hugging Face folder of several safetensors files; returns the model. Logits spread over about 1."""
    config_class = MistralConfig if model_class is MistralForCausalLM else LlamaConfig
    settings: dict[str, Any] = {
        "vocab_size": 60,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "intermediate_size": 80,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    model = model_class(config_class(**settings | changes)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.save_pretrained(folder, max_shard_size="40KB")
    return model


def tower(prefix: str) -> dict[str, Tensor]:
    """EVA-CLIP's vision tower for pictures of 8 pixels in patches of 4."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, VISION_WIDTH),
        "pos_embed": (1, 5, VISION_WIDTH),
        "patch_embed.proj.weight": (VISION_WIDTH, 3, 4, 4),
        "patch_embed.proj.bias": (VISION_WIDTH,),
        "norm.weight": (VISION_WIDTH,),
        "norm.bias": (VISION_WIDTH,),
        "head.weight": (10, VISION_WIDTH),
        "head.bias": (10,),
    }
    for layer in range(LAYERS):
        for name, shape in {
            "norm1.weight": (VISION_WIDTH,),
            "norm1.bias": (VISION_WIDTH,),
            "attn.q_bias": (VISION_WIDTH,),
            "attn.v_bias": (VISION_WIDTH,),
            "attn.qkv.weight": (3 * VISION_WIDTH, VISION_WIDTH),
            "attn.proj.weight": (VISION_WIDTH, VISION_WIDTH),
            "attn.proj.bias": (VISION_WIDTH,),
            "norm2.weight": (VISION_WIDTH,),
            "norm2.bias": (VISION_WIDTH,),
            "mlp.fc1.weight": (24, VISION_WIDTH),
            "mlp.fc1.bias": (24,),
            "mlp.fc2.weight": (VISION_WIDTH, 24),
            "mlp.fc2.bias": (VISION_WIDTH,),
        }.items():
            shapes[f"blocks.{layer}.{name}"] = shape
    return {prefix + name: torch.randn(shape) for name, shape in shapes.items()}


def eva_clip() -> dict[str, Tensor]:
    """A whole CLIP file: both towers."""
    return {
        **tower("visual."),
        "logit_scale": torch.tensor(4.6),
        "text.token_embedding.weight": torch.randn(30, 12),
        "text.transformer.resblocks.0.attn.in_proj_weight": torch.randn(36, 12),
    }


def causal_transformer() -> dict[str, Tensor]:
    """The released Emu's T5 decoder: 2 heads of 6, the table of positions in the first block, a table left over."""
    shapes: dict[str, tuple[int, ...]] = {
        "cformer.causal_tokens": (1, QUERIES, T5_WIDTH),
        "cformer.projection.weight": (WIDTH, T5_WIDTH),
        "cformer.projection.bias": (WIDTH,),
        "cformer.cformer.embed_tokens.weight": (40, T5_WIDTH),
        "cformer.cformer.final_layer_norm.weight": (T5_WIDTH,),
        "cformer.cformer.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (8, 2),
    }
    for layer in range(LAYERS):
        block = f"cformer.cformer.block.{layer}."
        for number, module in enumerate(("SelfAttention", "EncDecAttention", "DenseReluDense")):
            shapes[f"{block}layer.{number}.layer_norm.weight"] = (T5_WIDTH,)
            for name in "qkvo" if number < 2 else ():
                width = VISION_WIDTH if number == 1 and name in "kv" else T5_WIDTH
                shapes[f"{block}layer.{number}.{module}.{name}.weight"] = (T5_WIDTH, width)
        shapes[f"{block}layer.2.DenseReluDense.wi.weight"] = (20, T5_WIDTH)
        shapes[f"{block}layer.2.DenseReluDense.wo.weight"] = (T5_WIDTH, 20)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def emu(num_special: int = 4) -> dict[str, Tensor]:
    """A released Emu, with everything in it that has no use, in bf16 where the released one is."""
    vocabulary = VOCABULARY + num_special
    language: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (vocabulary, WIDTH),
        "stu_regress_head.weight": (WIDTH, WIDTH),
    }
    for layer in range(LAYERS):
        for name, shape in {
            **{f"self_attn.{which}_proj.weight": (WIDTH, WIDTH) for which in "qkvo"},
            "self_attn.rotary_emb.inv_freq": (4,),
            "mlp.gate_proj.weight": (48, WIDTH),
            "mlp.up_proj.weight": (48, WIDTH),
            "mlp.down_proj.weight": (WIDTH, 48),
            "input_layernorm.weight": (WIDTH,),
            "post_attention_layernorm.weight": (WIDTH,),
        }.items():
            language[f"model.layers.{layer}.{name}"] = shape
    return {
        **tower("visual."),
        "ln_visual.weight": torch.randn(VISION_WIDTH),
        "ln_visual.bias": torch.randn(VISION_WIDTH),
        **causal_transformer(),
        **{f"decoder.lm.{name}": torch.randn(shape).bfloat16() for name, shape in language.items()},
    }


def with_peft(state: dict[str, Tensor], base_layer: bool) -> dict[str, Tensor]:
    """As PEFT keeps the language model; base_layer: where its versions from 0.7 on put the matrices."""
    wrapped = {}
    for name, tensor in state.items():
        wrapped_name = name.replace("decoder.lm.", "decoder.lm.base_model.model.")
        if ".self_attn." in name and name.endswith("_proj.weight"):
            stem = wrapped_name.removesuffix(".weight")
            wrapped[f"{stem}.lora_A.default.weight"] = torch.randn(2, tensor.shape[1])
            wrapped[f"{stem}.lora_B.default.weight"] = torch.randn(tensor.shape[0], 2)
            wrapped_name = f"{stem}.base_layer.weight" if base_layer else wrapped_name
        wrapped[wrapped_name] = tensor
    return wrapped
