"""The fp32 state inside a DeepSpeed engine, seen as fragments: which slices of which parameters this rank owns.

At every ZeRO stage the optimizer updates fp32 tensors (`owner` below) that its `state` is keyed by: the parameters
themselves (stage 0; in bf16 a copy of each), one flat tensor per parameter group (stages 1 and 2: this rank's partition
of it), or one per sub-group of partitioned parameters (stage 3). What differs is only where a parameter lies in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.weights.fragments import Fragment
from trainer.topology import Topology

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OwnedSlice:
    """A fragment, its values, and where the optimizer keeps its moments.

    weight: 1-D view of the fp32 master weights, or of a frozen parameter (then owner is None).
    owner, start: the tensor that keys the optimizer's state, and the fragment's first element in it.
    is_primary: of the ranks that own this same slice, exactly one writes it to a checkpoint.
    """

    fragment: Fragment
    weight: Tensor
    owner: Tensor | None
    start: int
    is_primary: bool

    def moment(self, optimizer: torch.optim.Optimizer, name: str) -> Tensor:
        """1-D view of exp_avg or exp_avg_sq; the optimizer must have state (`has_moments`)."""
        assert self.owner is not None
        return optimizer.state[self.owner][name].view(-1).narrow(0, self.start, self.fragment.length)


def base_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """The Adam under DeepSpeed's wrapper; ZeRO-0 in fp32 has no wrapper."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def has_moments(optimizer: torch.optim.Optimizer, owned: OwnedSlice) -> bool:
    """False for frozen parameters, and for all before the first step: Adam makes its state when it first steps."""
    return owned.owner is not None and "exp_avg" in optimizer.state.get(owned.owner, {})


def step_count(optimizer: torch.optim.Optimizer, owned: OwnedSlice) -> int:
    """How many updates Adam has made (its bias correction depends on it)."""
    if owned.owner is None or not has_moments(optimizer, owned):
        return 0
    return int(optimizer.state[owned.owner]["step"])


def create_moments(engine: DeepSpeedEngine, owned: OwnedSlice, steps: int) -> None:
    """Make zero moments if the optimizer has not stepped yet, and set its step count."""
    if owned.owner is None:
        return
    optimizer = base_optimizer(engine)
    state = optimizer.state[owned.owner]
    if not has_moments(optimizer, owned):
        state.update({name: torch.zeros_like(owned.owner, requires_grad=False) for name in MOMENTS})
    state["step"] = _step_value(optimizer, owned.owner, steps)


def global_shapes(engine: DeepSpeedEngine, topology: Topology) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter with its tensor-parallel shards put together."""
    return {name: _layout(name, p, topology).shape for name, p in engine.module.named_parameters()}


def owned_slices(engine: DeepSpeedEngine, topology: Topology) -> Iterator[OwnedSlice]:
    """All slices this rank owns. Over all ranks the primary ones hold every element of every parameter exactly once."""
    _refuse_buffers(engine.module)
    masters = _unpartitioned_masters(engine.optimizer)
    for name, parameter in engine.module.named_parameters():
        layout = _layout(name, parameter, topology)
        first_tp = layout.tp_dim is not None or topology.tp_rank == 0
        if hasattr(parameter, "ds_tensor"):
            owned = _partitioned_slice(engine.optimizer, layout, parameter, topology.dp_rank, first_tp)
        elif hasattr(parameter, "_hp_mapping"):
            owned = _mapped_slice(engine.optimizer, layout, parameter, first_tp)
        else:
            master = masters.get(parameter, parameter)
            owner = master if parameter.requires_grad else None
            owned = OwnedSlice(layout, master.detach().view(-1), owner, 0, first_tp and topology.dp_rank == 0)
        if owned is not None and owned.fragment.length:
            yield owned


@torch.no_grad()
def publish_weights(engine: DeepSpeedEngine) -> None:
    """Copy changed fp32 masters into the weights the model computes with. Collective: every rank calls it."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        _publish_partitioned(optimizer)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    else:
        for parameter, master in _unpartitioned_masters(optimizer).items():
            parameter.copy_(master)


def _layout(name: str, parameter: Any, topology: Topology) -> Fragment:
    """The whole shard this rank's data-parallel group holds of a parameter."""
    shape = list(getattr(parameter, "ds_shape", parameter.shape))
    numel = getattr(parameter, "ds_numel", parameter.numel())
    if not getattr(parameter, "tensor_model_parallel", False):
        return Fragment(name, tuple(shape), None, 0, 1, 0, numel)
    assert getattr(parameter, "partition_stride", 1) == 1, f"{name}: shards must be contiguous blocks"
    shape[parameter.partition_dim] *= topology.tp_size
    return Fragment(name, tuple(shape), parameter.partition_dim, topology.tp_rank, topology.tp_size, 0, numel)


def _unpartitioned_masters(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    """ZeRO-0 in bf16: the fp32 copy of every trained parameter. Empty at ZeRO-0 in fp32."""
    assert not hasattr(optimizer, "fp32_groups_flat"), "ZeRO-0 in bf16 is supported with torch.optim.AdamW only"
    if not hasattr(optimizer, "fp32_groups"):
        return {}
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {p: master for parameters, masters in groups for p, master in zip(parameters, masters, strict=True)}


def _mapped_slice(optimizer: Any, layout: Fragment, parameter: Any, first_tp: bool) -> OwnedSlice | None:
    """ZeRO-1 and 2: the part of the parameter that falls into this rank's partition, if any does."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    # The bf16 optimizer of stage 1 has the same list under another name.
    is_bf16 = hasattr(optimizer, "fp32_groups_flat_partition")
    partitions = optimizer.fp32_groups_flat_partition if is_bf16 else optimizer.single_partition_of_fp32_groups
    owner, address = partitions[mapping.param_group_index], mapping.lp_fragment_address
    fragment = replace(layout, offset=address.start, length=address.numel)
    start = mapping.get_hp_fragment_address().start
    return OwnedSlice(fragment, owner.detach().narrow(0, start, address.numel), owner, start, first_tp)


def _partitioned_slice(
    optimizer: Any, layout: Fragment, parameter: Any, dp_rank: int, first_tp: bool
) -> OwnedSlice | None:
    """ZeRO-3: this rank's equal part of the parameter; the last ranks' parts end in padding or are nothing else."""
    partition = parameter.ds_tensor.numel()
    offset = min(dp_rank * partition, layout.length)
    fragment = replace(layout, offset=offset, length=min(partition, layout.length - offset))
    if not parameter.requires_grad:
        weight = parameter.ds_tensor.detach().view(-1).narrow(0, 0, fragment.length)
        return OwnedSlice(fragment, weight, None, 0, first_tp)
    sub_group, start, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    owner = optimizer.fp32_partitioned_groups_flat[sub_group]
    return OwnedSlice(fragment, owner.detach().narrow(0, start, fragment.length), owner, start, first_tp)


def _publish_partitioned(optimizer: Any) -> None:
    # Small parameters stay gathered between steps; without a new gather they would keep their old values.
    optimizer.checkpoint_event_prologue()
    for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        for parameter in parameters:
            _, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            parameter.ds_tensor.copy_(masters.narrow(0, start, length).view_as(parameter.ds_tensor))
    optimizer.checkpoint_event_epilogue()


def _step_value(optimizer: torch.optim.Optimizer, owner: Tensor, steps: int) -> Tensor | int:
    """torch's Adam counts in a tensor, on the device only if its kernel reads it there; DeepSpeed's count in an int."""
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return steps
    on_device = optimizer.defaults.get("capturable") or optimizer.defaults.get("fused")
    return torch.tensor(float(steps), device=owner.device if on_device else "cpu")


def _refuse_buffers(module: nn.Module) -> None:
    """Only parameters are stored: a persistent buffer would be lost without a word."""
    for path, child in module.named_modules():
        persistent = set(child._buffers) - child._non_persistent_buffers_set
        assert not persistent, f"{path}: register {sorted(persistent)} with persistent=False, or as parameters"
