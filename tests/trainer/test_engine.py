"""What the optimizer gets: learning rates per module, and what is not decayed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.comm.torch import build_shm_op
from megatron.core import parallel_state

from conf import UserError
from models.config import ObjectiveConfig
from models.emu import Emu
from tests.distributed.parity import Layout, make_config
from tests.models.tiny_emu import NUM_SOURCES, tiny_config
from trainer.config import OptimConfig, ParallelConfig, PretrainConfig
from trainer.engine import (
    build_engine,
    build_model,
    deepspeed_settings,
    parameter_groups,
    partial_parameters,
    set_process_options,
)
from trainer.topology import Topology


@pytest.fixture(scope="module", autouse=True)
def single_process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def build() -> Emu:
    return Emu(tiny_config(), ObjectiveConfig(), NUM_SOURCES)


def settings_of() -> dict[str, tuple[float, float]]:
    """Parameter name -> (learning rate, weight decay), and every parameter in one group."""
    model, optim = build(), OptimConfig(vision_encoder_lr=4e-5, causal_transformer_lr=1e-4, language_model_lr=3e-5)
    groups = parameter_groups(model, optim)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    settings = [
        (names[id(parameter)], (group["lr"], group["weight_decay"]))
        for group in groups
        for parameter in group["params"]
    ]
    assert len(settings) == len(dict(settings)) == len(names)
    assert all(group["peak_lr"] == group["lr"] for group in groups)
    return dict(settings)


def test_three_learning_rates() -> None:
    expected = {
        "vision_encoder": 4e-5,
        "causal_transformer": 1e-4,
        "language_model": 3e-5,
        "text_head": 3e-5,
        "regression_head": 3e-5,
    }
    found = {(name.split(".")[0], lr) for name, (lr, _) in settings_of().items()}
    assert found == set(expected.items())


def test_norms_biases_queries_and_position_tables_are_not_decayed() -> None:
    settings = settings_of()
    decays = {name: decay for name, (_, decay) in settings.items()}
    assert set(decays.values()) == {0.0, 0.05}
    tables = {
        "vision_encoder.pos_embed",
        "vision_encoder.cls_token",
        "causal_transformer.queries",
        "causal_transformer.relative_attention_bias.weight",
    }
    assert tables <= decays.keys()
    for name, parameter in build().named_parameters():
        undecayed = name in tables or "norm" in name or name.endswith("bias") or parameter.ndim == 1
        assert decays[name] == (0.0 if undecayed else 0.05), name


def test_one_seed_one_model() -> None:
    """Every rank builds the whole model by itself: DeepSpeed partitions what must be equal."""
    weights = []
    for seed in (5, 5, 6):
        set_process_options(ParallelConfig(threads=1), seed)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in build().parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_an_attention_kernel_that_cannot_run_is_refused_before_the_model_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Flash attention in fp32 runs nowhere."""
    monkeypatch.setattr("trainer.engine.build_model", lambda *_: pytest.fail("built"))
    config = PretrainConfig(run_dir="run", model=tiny_config())
    config.model.language_model.attention = "varlen"
    with pytest.raises(UserError, match=r"model.language_model.attention=varlen cannot run here \(.*\): choose auto"):
        build_engine(config, Topology())


def test_a_start_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that is killed while it compiles would hang every later one."""
    builder = type(get_accelerator().create_op_builder("ShareMemCommBuilder"))
    monkeypatch.setattr(builder, "load", lambda _: pytest.fail("it would compile an all-reduce"))
    assert build_shm_op() is None


def test_determinism_does_not_fill_buffers() -> None:
    """DeepSpeed allocates large buckets at every step; to fill them took fifty times as long as a tiny step itself."""
    set_process_options(ParallelConfig(deterministic=True), seed=0)
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    finally:
        torch.use_deterministic_algorithms(False)


def test_zero_3_splits_every_module_as_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank ever holds the whole model, and the undecayed parameters are still told by their whole shapes."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    config = make_config(Layout(1, 1, 3), None)
    model = build_model(config, deepspeed_settings(config, accumulation_steps=1))
    assert all(p.numel() == 0 and p.ds_tensor.numel() == p.ds_numel for p in model.parameters())
    decays = [
        {name: group["weight_decay"] for group in parameter_groups(m, config.optim) for name, p in m.named_parameters()
         if any(p is other for other in group["params"])}
        for m in (model, build())
    ]  # fmt: skip
    assert decays[0] == decays[1]


def test_which_gradients_tensor_parallel_ranks_sum() -> None:
    model = build()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)] for p in partial_parameters(model, ParallelConfig(tensor=2, sequence=True))}
    encoders = {name for name in names.values() if name.startswith(("vision_encoder.", "causal_transformer."))}
    norms = {name for name in names.values() if name.startswith("language_model.") and "norm" in name}
    assert found == encoders | norms and len(norms) == 5
    assert {names[id(p)] for p in partial_parameters(model, ParallelConfig(tensor=2))} == encoders


@pytest.mark.skipif(torch.cuda.is_available(), reason="it works there")
def test_sequence_parallelism_without_cuda_is_refused() -> None:
    config = make_config(Layout(1, 2, 2), None)
    config.parallel.sequence = True
    with pytest.raises(UserError, match=r"parallel\.sequence=true works on CUDA only: set it to false"):
        build_engine(config, Topology())
