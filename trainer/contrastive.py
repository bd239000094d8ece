"""A small vision encoder from scratch, CLIP-style, in EVA-CLIP's file layout: the demo's stand-in for EVA-CLIP.

    python -m trainer.contrastive +experiment=demo      writes init.vision_encoder of that configuration

Image and caption of a pair are pulled together, the others of the batch apart (Radford et al. 2021). One process; all
pictures are held in memory; the text tower is thrown away, as Emu throws away CLIP's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from conf import UserError, run_cli
from data_pipelines.config import DataConfig
from data_pipelines.document import Document, Text
from data_pipelines.index import Index
from data_pipelines.loader import open_indexes
from data_pipelines.pictures import DecodeError, decode_pictures
from data_pipelines.reader import SourceReader
from data_pipelines.tokenizer import Tokenizer
from models.config import VisionConfig
from models.emu import build_vision_encoder
from models.vision_encoder import normalise_pixels
from models.weights.eva_clip import save_vision_encoder
from trainer.config import PretrainConfig, compose_config

NUM_STEPS, BATCH, LEARNING_RATE, WARMUP_STEPS = 450, 128, 1e-3, 100
POSITION_STD = 0.5
"""In so short a training places are learned only if positions weigh as much as pixels from the start (EVA: 0.02)."""
TEXT_LENGTH, TEXT_WIDTH, JOINT_WIDTH = 48, 128, 128


class TextTower(nn.Module):
    """Token ids int64 [B, L], 0 = padding -> [B, JOINT_WIDTH]."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, TEXT_WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(TEXT_LENGTH, TEXT_WIDTH))
        layer = nn.TransformerEncoderLayer(
            TEXT_WIDTH, 4, 2 * TEXT_WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.output = nn.Linear(TEXT_WIDTH, JOINT_WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        ids = ids[:, : int((ids > 0).sum(dim=1).max())]
        mask = ids > 0
        hidden = self.layers(self.tokens(ids) + self.positions[: ids.shape[1]], src_key_padding_mask=~mask)
        return self.output((hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True))


class ContrastivePair(nn.Module):
    """Both towers and a learned temperature; gives the symmetric InfoNCE loss and the share of right matches."""

    def __init__(self, vision: VisionConfig, vocab_size: int) -> None:
        super().__init__()
        self.vision_config = vision
        self.vision = build_vision_encoder(vision)
        nn.init.normal_(self.vision.pos_embed, std=POSITION_STD)
        self.vision_output = nn.Linear(vision.width, JOINT_WIDTH)
        self.text = TextTower(vocab_size)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        pixels = normalise_pixels(images, self.vision_config.pixel_mean, self.vision_config.pixel_std, torch.float32)
        image = F.normalize(self.vision_output(self.vision(pixels).mean(dim=1)), dim=-1)
        text = F.normalize(self.text(ids), dim=-1)
        logits = self.log_scale.exp() * image @ text.t()
        match = torch.arange(len(images))
        loss = (F.cross_entropy(logits, match) + F.cross_entropy(logits.t(), match)) / 2
        return loss, (logits.argmax(dim=1) == match).float().mean()


def captioned_images(
    data: DataConfig, indexes: dict[str, Index], tokenizer: Tokenizer, image_size: int
) -> tuple[Tensor, Tensor]:
    """uint8 [n, 3, H, W] and token ids int64 [n, TEXT_LENGTH] of every document that is one picture and one text."""
    images: list[np.ndarray] = []
    texts: list[str] = []
    for name, index in indexes.items():
        if data.sources[name].kind not in ("laion", "pairs"):
            continue
        reader = SourceReader(name, data, index)
        for chunk in tqdm(range(index.num_chunks), desc=f"reading {name}", unit="chunk", leave=False):
            for key, sample in reader.samples(chunk):
                document = reader.document(key, 0, sample)
                if isinstance(document, Document) and not reader.is_held_out(sample):
                    _add_pair(document, images, texts, data, image_size)
    if len(images) < BATCH:
        raise UserError(
            f"{len(images)} captioned images are too few for contrastive batches of {BATCH}: give data.sources of kind "
            f"laion or pairs with more samples"
        )
    ids = np.zeros((len(texts), TEXT_LENGTH), np.int64)
    for row, encoded in zip(ids, tokenizer.encode(texts), strict=True):
        row[: len(encoded[:TEXT_LENGTH])] = encoded[:TEXT_LENGTH]
    return torch.from_numpy(np.stack(images)), torch.from_numpy(ids)


def _add_pair(
    document: Document, images: list[np.ndarray], texts: list[str], data: DataConfig, image_size: int
) -> None:
    text = [element.text for element in document.elements if isinstance(element, Text)]
    pictures = [element for element in document.elements if not isinstance(element, Text)]
    if len(text) == len(pictures) == 1:
        decoded = decode_pictures(pictures, image_size, int(data.max_image_megapixels * 1e6))[0]
        if not isinstance(decoded, DecodeError):
            images.append(decoded)
            texts.append(text[0])


def train(model: ContrastivePair, images: Tensor, ids: Tensor, num_steps: int, seed: int) -> float:
    """AdamW with warm-up and cosine decay on random batches; returns the share of right matches over the last steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=WARMUP_STEPS)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, num_steps - WARMUP_STEPS))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], [WARMUP_STEPS])
    generator = torch.Generator().manual_seed(seed)
    matches = []
    for _ in (progress := tqdm(range(num_steps), desc="contrastive", unit="step")):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        loss, right = model(images[chosen], ids[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        matches.append(float(right))
        progress.set_postfix(loss=f"{loss.item():.3f}", matched=f"{matches[-1]:.2f}")
    return float(np.mean(matches[-50:]))


def run(config: PretrainConfig, num_steps: int = NUM_STEPS) -> None:
    if not config.init.vision_encoder.endswith(".safetensors"):
        raise UserError(f"init.vision_encoder={config.init.vision_encoder!r} must end in .safetensors")
    torch.manual_seed(config.seed)
    tokenizer = Tokenizer(config.data.tokenizer)
    vision = config.model.vision
    indexes = open_indexes(config.data, build_missing=True)
    images, ids = captioned_images(config.data, indexes, tokenizer, vision.image_size)
    model = ContrastivePair(vision, tokenizer.text_vocab_size)
    matched = train(model, images, ids, num_steps, config.seed)
    path = Path(config.init.vision_encoder)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_vision_encoder(model.vision, path)
    print(
        f"vision encoder {path}: {len(images)} pairs, {num_steps} steps, {matched:.2f} of captions matched in a batch "
        f"of {BATCH} (chance {1 / BATCH:.2f}); next: python -m trainer.pretrain +experiment=demo"
    )


if __name__ == "__main__":
    run_cli(lambda: run(compose_config(sys.argv[1:])))
