"""Where our parameters stand in other people's files: names, and the sizes that the shapes tell.

Three parts of the network, each under its own names there: the vision tower in EVA-CLIP's layout, the T5 decoder in the
released Emu's, and the language model in Hugging Face LLaMA's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from models.causal_transformer import CausalTransformer
from models.vision_encoder import VisionEncoder
from models.weights.tensor_files import StoredTensor

Shape = tuple[int, ...]
Tensors = dict[str, StoredTensor]

LLAMA_LAYER = (
    *("input_layernorm.weight", "post_attention_layernorm.weight"),
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
)
T5_NAMES = {
    "queries": "causal_tokens",
    "projection.weight": "projection.weight",
    "projection.bias": "projection.bias",
    "relative_attention_bias.weight": "cformer.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "final_norm.weight": "cformer.final_layer_norm.weight",
}
T5_BLOCK = {
    "self_norm": "layer.0.layer_norm",
    "self_attention": "layer.0.SelfAttention",
    "cross_norm": "layer.1.layer_norm",
    "cross_attention": "layer.1.EncDecAttention",
    "mlp_norm": "layer.2.layer_norm",
    "mlp": "layer.2.DenseReluDense",
}


@dataclass(frozen=True)
class Part:
    """One part of the network in a foreign file.

    prefix: of our names. foreign: our name without the prefix -> theirs. layer: pattern of their names that tells the
    number of a layer. names: ours, of a part of so many layers. sizes: of the `conf/model` section `section`, told by
    the shapes of complete names. shapes: of our names, for those sizes.
    """

    section: str
    prefix: str
    foreign: Callable[[str], str]
    layer: re.Pattern[str]
    names: Callable[[int], list[str]]
    sizes: Callable[[Callable[[str], Shape], int], dict[str, Any]]
    shapes: Callable[[dict[str, Any]], dict[str, Shape]]

    def num_layers(self, tensors: Iterable[str]) -> int:
        found = (self.layer.match(name) for name in tensors)
        return 1 + max((int(match[1]) for match in found if match), default=-1)


def vision_part(prefix: str, with_ln_visual: bool) -> Part:
    """prefix: of the tower's names there. ln_visual is Emu's own norm behind it, which EVA-CLIP does not have."""

    def foreign(name: str) -> str:
        return name if name.startswith("ln_visual.") else prefix + name

    def own(shapes: dict[str, Shape]) -> dict[str, Shape]:
        return {name: s for name, s in shapes.items() if with_ln_visual or not name.startswith("ln_visual.")}

    def sizes(shape: Callable[[str], Shape], num_layers: int) -> dict[str, Any]:
        patch_size = shape("patch_embed.proj.weight")[-1]
        return {
            "image_size": math.isqrt(max(0, shape("pos_embed")[1] - 1)) * patch_size,
            "patch_size": patch_size,
            "width": shape("cls_token")[-1],
            "num_layers": num_layers,
            "mlp_width": shape("blocks.0.mlp.fc1.weight")[0],
        }

    return Part(
        section="vision",
        prefix="vision_encoder.",
        foreign=foreign,
        layer=re.compile(re.escape(prefix) + r"blocks\.(\d+)\."),
        names=lambda layers: list(own(_vision_shapes(_ones("image_size patch_size width mlp_width", layers)))),
        sizes=sizes,
        shapes=lambda found: own(_vision_shapes(found)),
    )


def _vision_shapes(sizes: dict[str, Any]) -> dict[str, Shape]:
    with torch.device("meta"):
        return _shapes_of(VisionEncoder(**sizes, num_heads=1, norm_eps=1e-6))


def causal_transformer_part(prefix: str) -> Part:
    def foreign(name: str) -> str:
        if name in T5_NAMES:
            return prefix + T5_NAMES[name]
        _, number, module, rest = name.split(".", 3)
        return f"{prefix}cformer.block.{number}.{T5_BLOCK[module]}.{rest}"

    def sizes(shape: Callable[[str], Shape], num_layers: int) -> dict[str, Any]:
        buckets, num_heads = shape("relative_attention_bias.weight")
        output_width, width = shape("projection.weight")
        return {
            "vision_width": shape("blocks.0.cross_attention.k.weight")[1],
            "output_width": output_width,
            "num_queries": shape("queries")[1],
            "width": width,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "head_width": shape("blocks.0.self_attention.q.weight")[0] // num_heads,
            "mlp_width": shape("blocks.0.mlp.wi.weight")[0],
            "position_buckets": buckets,
        }

    fields = "vision_width output_width num_queries width num_heads head_width mlp_width position_buckets"
    return Part(
        section="causal_transformer",
        prefix="causal_transformer.",
        foreign=foreign,
        layer=re.compile(re.escape(prefix) + r"cformer\.block\.(\d+)\."),
        names=lambda layers: list(_causal_shapes(_ones(fields, layers))),
        sizes=sizes,
        shapes=_causal_shapes,
    )


def _causal_shapes(sizes: dict[str, Any]) -> dict[str, Shape]:
    with torch.device("meta"):
        return _shapes_of(CausalTransformer(**sizes, position_max_distance=128, norm_eps=1e-6, dropout=0.0))


def language_model_part(prefix: str) -> Part:
    """prefix: of `model.` there. The heads are parameters of their own: see `import_`."""

    def sizes(shape: Callable[[str], Shape], num_layers: int) -> dict[str, Any]:
        return {
            "vocabulary": shape("embed_tokens.weight")[0],
            "width": shape("embed_tokens.weight")[1],
            "num_layers": num_layers,
            "query_width": shape("layers.0.self_attn.q_proj.weight")[0],
            "key_width": shape("layers.0.self_attn.k_proj.weight")[0],
            "mlp_width": shape("layers.0.mlp.gate_proj.weight")[0],
        }

    return Part(
        section="language_model",
        prefix="language_model.",
        foreign=lambda name: prefix + name,
        layer=re.compile(re.escape(prefix) + r"layers\.(\d+)\."),
        names=lambda layers: list(_llama_shapes(_ones("vocabulary width query_width key_width mlp_width", layers))),
        sizes=sizes,
        shapes=_llama_shapes,
    )


def _llama_shapes(sizes: dict[str, Any]) -> dict[str, Shape]:
    width, mlp, query, key = (sizes[name] for name in ("width", "mlp_width", "query_width", "key_width"))
    of_layer: dict[str, Shape] = {
        "q_proj": (query, width),
        "k_proj": (key, width),
        "v_proj": (key, width),
        "o_proj": (width, query),
        "gate_proj": (mlp, width),
        "up_proj": (mlp, width),
        "down_proj": (width, mlp),
    }
    shapes: dict[str, Shape] = {"embed_tokens.weight": (sizes["vocabulary"], width), "norm.weight": (width,)}
    for number in range(sizes["num_layers"]):
        for name in LLAMA_LAYER:
            shapes[f"layers.{number}.{name}"] = of_layer.get(name.split(".")[-2], (width,))
    return shapes


def _ones(fields: str, num_layers: int) -> dict[str, Any]:
    return {**dict.fromkeys(fields.split(), 1), "num_layers": num_layers}


def _shapes_of(module: torch.nn.Module) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}
