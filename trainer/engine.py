"""From a configuration to a DeepSpeed engine: process groups, the model, its parameter groups."""

from __future__ import annotations

import contextlib
import io
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from megatron.core import parallel_state
from torch import Tensor, nn

from conf import UserError
from models.emu import Emu, gradient_keeping_graph
from models.weights.eva_clip import load_vision_encoder
from trainer.config import OptimConfig, ParallelConfig, PretrainConfig
from trainer.topology import MegatronGroups, Topology

MAX_BUCKET = 500_000_000
UNDECAYED = ("queries", "pos_embed", "cls_token", "relative_attention_bias")


def set_process_options(parallel: ParallelConfig, seed: int) -> None:
    """Threads, determinism and the seed: the same on every rank, so that all build the same weights."""
    if parallel.threads:
        torch.set_num_threads(parallel.threads)
    torch.use_deterministic_algorithms(parallel.deterministic, warn_only=torch.cuda.is_available())
    # Else every buffer is filled as it is made, DeepSpeed's gigabytes of hardly used buckets too: seconds a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(seed)


def init_distributed(parallel: ParallelConfig) -> Topology:
    """Join the process group that the launcher described in the environment; without one, a world of one process."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    with contextlib.redirect_stdout(io.StringIO()):  # it prints which extension it has built
        deepspeed.init_distributed(backend, timeout=timedelta(minutes=parallel.timeout_minutes), verbose=False)
    if torch.distributed.get_world_size() % parallel.tensor:
        raise UserError(
            f"{torch.distributed.get_world_size()} processes are no multiple of parallel.tensor={parallel.tensor}: "
            "change one of them"
        )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=parallel.tensor)
    return Topology(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        dp_group=parallel_state.get_data_parallel_group(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def build_model(config: PretrainConfig) -> Emu:
    """The model with its starting weights, on the CPU in fp32."""
    model = Emu(config.model, config.objective, num_sources=len(config.data.sources))
    if config.init.vision_encoder:
        load_vision_encoder(model.vision_encoder, config.init.vision_encoder)
    return model


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Per learning rate (Emu section 3.2) a decayed and an undecayed group; empty ones are left out."""
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    rates = {
        "vision_encoder": optim.vision_encoder_lr,
        "causal_transformer": optim.causal_transformer_lr,
        "language_model": optim.language_model_lr,
    }
    for name, parameter in model.named_parameters():
        owner = name.partition(".")[0]
        owner = owner if owner in rates else "language_model"
        decayed = parameter.ndim > 1 and not any(part in UNDECAYED for part in name.split("."))
        group = groups.setdefault(
            (owner, decayed),
            {
                "name": owner + ("" if decayed else "_undecayed"),
                "params": [],
                "lr": rates[owner],
                "peak_lr": rates[owner],
                "weight_decay": optim.weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def deepspeed_settings(config: PretrainConfig, accumulation_steps: int, num_parameters: int) -> dict[str, Any]:
    bucket = min(MAX_BUCKET, num_parameters)  # DeepSpeed allocates it whole, 2 GB by default even for a small model
    return {
        "train_micro_batch_size_per_gpu": config.data.micro_batch_rows,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": config.optim.grad_clip,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_param_persistence_threshold": config.parallel.persistence_threshold,
        },
        "bf16": {"enabled": config.parallel.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def build_engine(config: PretrainConfig, topology: Topology) -> DeepSpeedEngine:
    """Model, AdamW and DeepSpeed. Every rank builds the same weights; DeepSpeed partitions them."""
    model = build_model(config)
    optim = config.optim
    groups = parameter_groups(model, optim)
    optimizer = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    accumulation_steps = config.data.global_batch_rows // topology.dp_size // config.data.micro_batch_rows
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    settings = deepspeed_settings(config, accumulation_steps, num_parameters)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=settings,
        mpu=MegatronGroups() if topology.tp_size > 1 else None,
        dist_init_required=False,
    )
    if config.parallel.zero_stage == 3:
        model.early_gradient = _keep_zero3_counters(model, gradient_keeping_graph)
    return engine


def _keep_zero3_counters(model: nn.Module, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """ZeRO-3 gathers a module's weights for as many backward passes as it saw forward ones; an extra pass through the
    same graph must not be counted, or the real one would find the weights gone."""
    counters = ("applied_pre_backward_ref_cnt", "ds_grads_remaining")

    def wrapped(*args: Tensor) -> Tensor:
        before = [(module, name, module.__dict__[name]) for module in model.modules() for name in counters
                  if name in module.__dict__]  # fmt: skip
        result = function(*args)
        for module, name, value in before:
            module.__dict__[name] = value
        return result

    return wrapped
