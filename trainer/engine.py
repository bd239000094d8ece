"""From a configuration to a DeepSpeed engine: process groups, the model, its parameter groups."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from megatron.core import parallel_state
from torch import Tensor, nn

from conf import UserError
from conf.ports import free_port
from models.attention_backend import attention_backend
from models.emu import Emu, gradient_keeping_graph
from models.language_model import Parallelism
from models.tensor_parallel import sum_gradients
from models.weights.eva_clip import load_vision_encoder
from trainer.config import MAX_BUCKET, OptimConfig, ParallelConfig, PretrainConfig
from trainer.config_checks import data_parallel_size
from trainer.topology import Topology

# On a CPU DeepSpeed would compile an all-reduce of its own at the first start: a minute, and a start that is killed
# meanwhile leaves a lock for which all later ones wait for ever. What it finds by itself here it finds with a compiler.
deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
UNDECAYED = ("queries", "pos_embed", "cls_token", "relative_attention_bias")


class MegatronGroups:
    """megatron-core's process groups under the names by which DeepSpeed asks for them (`mpu`).

    What has "sequence" in its name is not there: DeepSpeed would stop to sum the gradient norm over the
    tensor-parallel group.
    """

    def __getattr__(self, name: str) -> Any:
        if "sequence" in name:
            raise AttributeError(name)
        return getattr(parallel_state, name.replace("get_model_parallel", "get_tensor_model_parallel"))


def set_process_options(parallel: ParallelConfig, seed: int) -> None:
    """Threads, determinism and the seed: the same on every rank, so that all build the same weights."""
    if parallel.threads:
        torch.set_num_threads(parallel.threads)
    if parallel.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # is read when CUDA starts
    torch.use_deterministic_algorithms(parallel.deterministic, warn_only=torch.cuda.is_available())
    # Else every buffer is filled as it is made, DeepSpeed's gigabytes of hardly used buckets too: seconds a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(seed)


def init_distributed(parallel: ParallelConfig) -> Topology:
    """Join the process group that the launcher described in the environment; without one, a world of one process."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(backend, timeout=timedelta(minutes=parallel.timeout_minutes), verbose=False)
    world_size = torch.distributed.get_world_size()
    dp_size = data_parallel_size(parallel.tensor, world_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        create_gloo_process_groups=False,  # nothing uses them, and a wrong host name would stop the start
        distributed_timeout_minutes=parallel.timeout_minutes,
    )
    return Topology(
        rank=torch.distributed.get_rank(),
        world_size=world_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=dp_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        dp_group=parallel_state.get_data_parallel_group(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
    )


def build_model(config: PretrainConfig, settings: dict[str, Any]) -> Emu:
    """The model with its starting weights; at ZeRO-3 every module is split over the ranks as soon as it is made.

    settings: for DeepSpeed. The ranks are those of the data-parallel group: over the world, which zero.Init takes if it
    is left to choose, all tensor-parallel ranks would silently get the first one's shards.
    """
    is_split = config.parallel.zero_stage == 3
    parallelism = Parallelism(config.parallel.sequence, config.parallel.activation_checkpointing)
    group = parallel_state.get_data_parallel_group()
    with deepspeed.zero.Init(data_parallel_group=group, config_dict_or_path=settings, enabled=is_split):
        model = Emu(config.model, config.objective, len(config.data.sources), parallelism)
    if config.init.vision_encoder:
        encoder = list(model.vision_encoder.parameters())
        with deepspeed.zero.GatheredParameters(encoder, modifier_rank=0, enabled=is_split):
            load_vision_encoder(model.vision_encoder, config.init.vision_encoder)
    return model


def check_attention(config: PretrainConfig) -> None:
    """UserError where the attention kernel that the configuration names cannot run: before the model is built."""
    language = config.model.language_model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if config.parallel.precision == "bf16" else torch.float32
    attention_backend(language.attention, device, dtype, language.width_of_head)


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
        num_dims = len(getattr(parameter, "ds_shape", parameter.shape))
        decayed = num_dims > 1 and not any(part in UNDECAYED for part in name.split("."))
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


def deepspeed_settings(config: PretrainConfig, accumulation_steps: int) -> dict[str, Any]:
    parallel = config.parallel
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "stage3_param_persistence_threshold": parallel.persistence_threshold,
    }
    places = {"offload_optimizer": parallel.offload_optimizer, "offload_param": parallel.offload_parameters}
    for key, device in places.items():
        if device != "none":
            zero[key] = {"device": device, "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": config.data.micro_batch_rows,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": config.optim.grad_clip,
        "zero_optimization": zero,
        "bf16": {"enabled": parallel.precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is as fast there and needs no compiler
        "steps_per_print": 10**9,
    }


def check_device(parallel: ParallelConfig) -> None:
    """UserError for what needs a CUDA device: megatron-core makes the buffers of sequence parallelism there."""
    if parallel.sequence and not torch.cuda.is_available():
        raise UserError("parallel.sequence=true works on CUDA only: set it to false")


def build_engine(config: PretrainConfig, topology: Topology) -> DeepSpeedEngine:
    """Model, AdamW and DeepSpeed."""
    check_device(config.parallel)
    check_attention(config)
    optim = config.optim
    accumulation_steps = config.data.global_batch_rows // topology.dp_size // config.data.micro_batch_rows
    settings = deepspeed_settings(config, accumulation_steps)
    model = build_model(config, settings)
    num_parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    for bucket in ("reduce_bucket_size", "allgather_bucket_size"):  # DeepSpeed allocates them whole, 2 GB by default
        settings["zero_optimization"][bucket] = min(MAX_BUCKET, num_parameters)
    if topology.tp_size > 1:
        assert topology.tp_group is not None
        sum_gradients(partial_parameters(model, config.parallel), topology.tp_group)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, optim), betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=settings,
        mpu=MegatronGroups() if topology.tp_size > 1 else None,
        dist_init_required=False,
    )
    if topology.dp_size == 1 and config.parallel.zero_stage == 0:
        engine.enable_backward_allreduce = False  # it would copy all gradients to sum them over one rank
    if config.parallel.zero_stage == 3:
        model.early_gradient = _keep_zero3_counters(model, gradient_keeping_graph)
    return engine


def partial_parameters(model: Emu, parallel: ParallelConfig) -> list[nn.Parameter]:
    """Replicated parameters that each tensor-parallel rank applies to a part of the micro-batch only.

    The other replicated ones (norms without sequence parallelism, the regression head) see the same on all ranks of the
    group, and so get the same gradient, bit for bit: nothing else keeps them equal.
    """
    encoders = [*model.vision_encoder.parameters(), *model.causal_transformer.parameters()]
    return encoders + (model.language_model.norms() if parallel.sequence else [])


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
