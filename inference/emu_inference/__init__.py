"""Emu, exported: reads and writes text and visual embeddings (arXiv 2307.05222).

from emu_inference import EmuModel, EmuProcessor

model, processor = EmuModel.from_pretrained(folder), EmuProcessor.from_pretrained(folder)
processor.decode(model.generate(processor([[image]])))      # captions
model.regress_image(processor([["a red circle"]]))          # visual embeddings [B, N, W] of what a text describes
model.encode_images(processor.pixels([image]))              # visual embeddings [M, N, W] of images
"""

from emu_inference.config import EmuConfig, UserError
from emu_inference.modeling_emu import EMU_RELEASE, GREEDY, EmuModel, GenerationOptions
from emu_inference.processing_emu import EmuInputs, EmuProcessor

__all__ = [
    "EMU_RELEASE",
    "GREEDY",
    "EmuConfig",
    "EmuInputs",
    "EmuModel",
    "EmuProcessor",
    "GenerationOptions",
    "UserError",
]
