"""A small Emu with random weights: as the trainer knows it, as a checkpoint, and exported."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import sentencepiece
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from data_pipelines.tokenizer import Tokenizer
from models.config import CausalTransformerConfig, LanguageModelConfig, ModelConfig, ObjectiveConfig, VisionConfig
from models.emu import Emu
from trainer.checkpoint_writer import save_checkpoint
from trainer.export import ExportConfig, export
from trainer.topology import Topology

STEP = 7
SENTENCE = "a small large red green blue circle square triangle left of right above below the and what colour is it"


@pytest.fixture(scope="package", autouse=True)
def single_process_group() -> Iterator[None]:
    """The trainer's language model asks for its tensor-parallel group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(scope="package")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([SENTENCE] * 20),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="package")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(tokenizer_path)


@pytest.fixture(scope="package")
def model_config(tokenizer: Tokenizer) -> ModelConfig:
    """Grouped-query attention and sizes that all differ, so that a mixed-up one shows."""
    return ModelConfig(
        name="test",
        vision=VisionConfig(image_size=24, patch_size=8, width=32, num_layers=2, num_heads=4, mlp_width=48),
        causal_transformer=CausalTransformerConfig(
            num_queries=5, width=24, num_layers=2, num_heads=2, head_width=16, mlp_width=40
        ),
        language_model=LanguageModelConfig(
            text_vocab_size=tokenizer.text_vocab_size,
            width=64,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            mlp_width=96,
            rope_base=5000.0,
            max_positions=128,
        ),
    )


@pytest.fixture(scope="package")
def reference(model_config: ModelConfig) -> Emu:
    """The trainer's model. Every weight is random, norms and biases too; `</s>` is likely enough to end some texts, and
    special tokens to be said where they are not suppressed."""
    torch.manual_seed(0)
    emu = Emu(model_config, ObjectiveConfig(), num_sources=1).eval().requires_grad_(False)
    for name, parameter in emu.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.normal_(mean, std=0.1 if name.startswith("language_model") else 0.15)
    emu.text_head.weight[2] *= 2.5
    emu.text_head.weight[-4:] *= 2.5
    emu.regression_head.weight *= 0.5
    return emu


@pytest.fixture(scope="package")
def run_dir(
    tmp_path_factory: pytest.TempPathFactory, reference: Emu, model_config: ModelConfig, tokenizer_path: Path
) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_run(folder, reference, model_config, tokenizer_path)
    return folder


@pytest.fixture(scope="package")
def exported(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(ExportConfig(run_dir=str(run_dir), out=str(tmp_path_factory.mktemp("exported") / "emu")))


@pytest.fixture(scope="package")
def package(exported: Path) -> Iterator[ModuleType]:
    """The module `emu_inference` of the exported folder."""
    sys.path.insert(0, str(exported))
    yield importlib.import_module("emu_inference")
    sys.path.remove(str(exported))
    for name in [name for name in sys.modules if name.partition(".")[0] == "emu_inference"]:
        del sys.modules[name]


@pytest.fixture(scope="package")
def model(package: ModuleType, exported: Path) -> Any:
    return package.EmuModel.from_pretrained(exported)


@pytest.fixture(scope="package")
def processor(package: ModuleType, exported: Path) -> Any:
    return package.EmuProcessor.from_pretrained(exported)


def save_run(folder: Path, emu: Emu, model_config: ModelConfig, tokenizer_path: Path, step: int = STEP) -> Path:
    """A checkpoint as the trainer saves it; at ZeRO stage 0 an engine is a module and an optimizer."""
    engine: Any = SimpleNamespace(module=emu, optimizer=torch.optim.AdamW(emu.parameters()))
    state = {
        "config": {
            "model": asdict(model_config),
            "data": {"tokenizer": str(tokenizer_path)},
            "objective": asdict(ObjectiveConfig()),
        },
        "order": {"tokenizer": Tokenizer(tokenizer_path).digest},
    }
    return save_checkpoint(folder, engine, Topology(), step, state, rank_state={})


def picture(seed: int, size: tuple[int, int] = (37, 29)) -> PIL.Image.Image:
    """Coarse noise."""
    noise = np.random.default_rng(seed).integers(256, size=(6, 7, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize(size)


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
