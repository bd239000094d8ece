"""Emu for inference: vision encoder, causal transformer, transformers' LLaMA, and the regression head.

Shapes: B prompts of S positions (left-padded, see `EmuInputs`), M images of N visual embeddings, W width of the
language model, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from emu_inference.causal_transformer import CausalTransformer
from emu_inference.config import EmuConfig, LanguageModelConfig, UserError, sizes
from emu_inference.processing_emu import EmuInputs
from emu_inference.vision_encoder import VisionEncoder, normalise_pixels

INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class GenerationOptions:
    """num_beams: 1 = greedy. max_new_tokens: then the text is cut. length_penalty: beams are ranked by the sum of their
    log-probabilities / length ** length_penalty, so 0 favours short texts."""

    num_beams: int = 1
    max_new_tokens: int = 50
    length_penalty: float = 0.0


GREEDY = GenerationOptions()
"""The default: small models that know their answer lose nothing by it, and it costs a fifth."""
EMU_RELEASE = GenerationOptions(num_beams=5, max_new_tokens=50, length_penalty=0.0)
"""The defaults of Emu's released code."""


@dataclass
class EmuOutput:
    """What both heads say at every position: logits [B, S, V] of the next token, regressed [B, S, W] next embedding."""

    logits: Tensor
    regressed: Tensor


class EmuModel(nn.Module):
    def __init__(self, config: EmuConfig) -> None:
        super().__init__()
        self.config = config
        width = config.language_model.width
        self.vision_encoder = VisionEncoder(**sizes(config.vision))
        self.causal_transformer = CausalTransformer(
            config.vision.width, width, dropout=0.0, **sizes(config.causal_transformer)
        )
        self.language_model = LlamaForCausalLM(llama_config(config.language_model))
        self.regression_head = nn.Linear(width, width, bias=False)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> EmuModel:
        """The model of an exported folder, for inference. dtype: None = as stored. UserError if files are missing."""
        config = EmuConfig.from_pretrained(folder)
        with torch.device("meta"):  # no memory and no random start for weights that are about to be read
            model = cls(config)
        rotary = LlamaRotaryEmbedding(model.language_model.config)  # its tables are in no file
        model.language_model.model.rotary_emb = rotary.to(device)
        weights = _read_weights(Path(folder), device, dtype)
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise UserError(f"the weights in {folder} are not those of its config.json: export it again") from error
        return model.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return self.regression_head.weight.device

    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 [M, 3, H, W] (`EmuProcessor.pixels`) -> visual embeddings [M, N, W]."""
        vision = self.config.vision
        pixels = normalise_pixels(
            images.to(self.device), vision.pixel_mean, vision.pixel_std, self.regression_head.weight.dtype
        )
        return self.causal_transformer(self.vision_encoder(pixels))

    def embed(self, inputs: EmuInputs) -> Tensor:
        """Token embeddings [B, S, W], those of the images in their slots."""
        embeddings = self.language_model.get_input_embeddings()(inputs.input_ids)
        if len(inputs.images):
            slots = inputs.input_ids == self.config.tokens.image
            embeddings[slots] = self.encode_images(inputs.images).flatten(0, 1)
        return embeddings

    def forward(self, inputs: EmuInputs) -> EmuOutput:
        inputs = inputs.to(self.device)
        positions = _positions(inputs.attention_mask)
        hidden = self.language_model.model(
            inputs_embeds=self.embed(inputs), attention_mask=inputs.attention_mask, position_ids=positions
        ).last_hidden_state
        return EmuOutput(self.language_model.lm_head(hidden), self.regression_head(hidden))

    @torch.inference_mode()
    def generate(self, inputs: EmuInputs, options: GenerationOptions = GREEDY) -> list[list[int]]:
        """Ids that follow each prompt, up to and without `</s>`. Deterministic."""
        self._check_length(inputs, options.max_new_tokens)
        inputs = inputs.to(self.device)
        language_model: Any = self.language_model  # transformers' annotations of `generate` refuse its own models
        generated = language_model.generate(
            inputs_embeds=self.embed(inputs),
            attention_mask=inputs.attention_mask,
            generation_config=self._generation_config(options),
        )
        tokens = self.config.tokens
        return [_before(ids, tokens.eos) for ids in generated.tolist()]

    @torch.inference_mode()
    def regress_image(self, inputs: EmuInputs) -> Tensor:
        """The visual embeddings [B, N, W] of the image that comes next: `[IMG]`, then N times the regressed embedding
        is the next input (Emu section 2.3)."""
        num_queries = self.config.causal_transformer.num_queries
        self._check_length(inputs, num_queries)
        inputs = inputs.to(self.device)
        input_ids = F.pad(inputs.input_ids, (0, 1), value=self.config.tokens.img_start)
        mask = F.pad(inputs.attention_mask, (0, num_queries), value=1)
        positions = _positions(mask)
        step = self.embed(EmuInputs(input_ids, mask, inputs.images))
        cache, start, regressed = None, 0, []
        for _ in range(num_queries):
            end = start + step.shape[1]
            output = self.language_model.model(
                inputs_embeds=step,
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
            cache, start = output.past_key_values, end
            step = self.regression_head(output.last_hidden_state[:, -1:])
            regressed.append(step)
        return torch.cat(regressed, dim=1)

    def _check_length(self, inputs: EmuInputs, num_new: int) -> None:
        length, limit = inputs.input_ids.shape[1], self.config.language_model.max_positions
        if length + num_new > limit:
            raise UserError(
                f"a prompt of {length} positions and {num_new} new ones exceed the model's {limit}: shorten the prompt"
            )

    def _generation_config(self, options: GenerationOptions) -> GenerationConfig:
        tokens = self.config.tokens
        beams = {"num_beams": options.num_beams, "length_penalty": options.length_penalty}
        return GenerationConfig(
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            bos_token_id=tokens.bos,
            eos_token_id=tokens.eos,
            pad_token_id=tokens.pad,
            # Never targets of the text loss, so the model has not learnt when to say them.
            suppress_tokens=[tokens.pad, tokens.img_start, tokens.img_end, tokens.image],
            **(beams if options.num_beams > 1 else {}),
        )


def llama_config(config: LanguageModelConfig) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        intermediate_size=config.mlp_width,
        rms_norm_eps=config.norm_eps,
        head_dim=config.head_width or config.width // config.num_heads,
        rope_parameters=_rope_parameters(config),
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=False,
    )


def _rope_parameters(config: LanguageModelConfig) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_scaling != "none":
        parameters |= {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "llama3":
        parameters |= {
            "low_freq_factor": config.rope_low_frequency_factor,
            "high_freq_factor": config.rope_high_frequency_factor,
            "original_max_position_embeddings": config.rope_original_positions,
        }
    return parameters


def _positions(attention_mask: Tensor) -> Tensor:
    """int64 [B, S]: 0 at the first position that is no padding."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def _before(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def _read_weights(folder: Path, device: torch.device | str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    weights = {}
    try:
        weight_map = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        for name in tqdm(sorted(set(weight_map.values())), desc="loading", unit="file", delay=5):
            shard = load_file(folder / Path(name).name, device=str(device))
            weights.update({key: tensor.to(dtype or tensor.dtype) for key, tensor in shard.items()})
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the weights in {folder} cannot be read ({error}): copy the whole exported folder") from error
    return weights
