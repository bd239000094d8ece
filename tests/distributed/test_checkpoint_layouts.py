"""Checkpoints across layouts: written by one (dp, tp, ZeRO stage), read by another, training goes on the same.

Each process start costs seconds, so a few starts run all cases, and the tests look at what they brought back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.weights.fragment_files import FragmentReader, read_weights
from models.weights.fragments import whole
from tests.distributed.harness import run_distributed
from trainer.checkpoint import load_checkpoint
from trainer.checkpoint_writer import save_checkpoint
from trainer.engine_state import MOMENTS
from trainer.topology import Topology

pytestmark = pytest.mark.slow

NUM_BEFORE, NUM_AFTER = 3, 3
GLOBAL_ROWS, SEQ_LEN, VOCABULARY, WIDTH = 4, 8, 32, 16
LEARNING_RATES, WEIGHT_DECAYS = (1e-2, 3e-3, 1e-3), (0.1, 0.0)


@dataclass(frozen=True)
class Layout:
    """client_optimizer: torch.optim.AdamW is handed to DeepSpeed, which otherwise makes it from its configuration."""

    dp: int
    tp: int
    stage: int
    persistence_threshold: int | None = 0
    sub_group_size: int = 10**9
    client_optimizer: bool = True
    bf16: bool = False

    @property
    def world_size(self) -> int:
        return self.dp * self.tp


@dataclass(frozen=True)
class Case:
    """Train NUM_BEFORE steps from the start and save as `save`, or load `load`; then NUM_AFTER more."""

    layout: Layout
    save: str | None = None
    load: str | None = None


SINGLE = Layout(1, 1, 0)
DP2 = {stage: Layout(2, 1, stage) for stage in range(4)}
DP2_KEPT = Layout(2, 1, 3, persistence_threshold=None)
DP2_SUBGROUPS = Layout(2, 1, 3, sub_group_size=500, client_optimizer=False)
BF16 = {stage: Layout(2, 1, stage, bf16=True) for stage in range(4)}

STARTS: list[dict[str, Case]] = [
    {"single": Case(SINGLE, save="single"), "single again": Case(SINGLE, load="single")},
    {
        "dp2 tp2 z3": Case(Layout(2, 2, 3), save="dp2 tp2 z3"),
        "dp2 tp2 z3 again": Case(Layout(2, 2, 3), load="dp2 tp2 z3"),
        "single to dp4 z3": Case(Layout(4, 1, 3), load="single"),
        "single to tp4 z2": Case(Layout(1, 4, 2), load="single"),
    },
    {
        **{f"dp2 z{stage}": Case(layout, save=f"dp2 z{stage}") for stage, layout in DP2.items()},
        **{f"dp2 z{stage} again": Case(layout, load=f"dp2 z{stage}") for stage, layout in DP2.items()},
        **{f"single to dp2 z{stage}": Case(layout, load="single") for stage, layout in DP2.items() if stage},
        "dp2 z3 kept": Case(DP2_KEPT, save="dp2 z3 kept"),
        "dp2 z3 kept again": Case(DP2_KEPT, load="dp2 z3 kept"),
        "dp2 z3 subgroups": Case(DP2_SUBGROUPS, save="dp2 z3 subgroups"),
        "dp2 z3 to subgroups": Case(DP2_SUBGROUPS, load="dp2 z3"),
        "dp2 z1 to kept": Case(DP2_KEPT, load="dp2 z1"),
        "dp2 tp2 z3 to tp2 z1": Case(Layout(1, 2, 1), load="dp2 tp2 z3"),
        "dp2 tp2 z3 to dp2 z2": Case(DP2[2], load="dp2 tp2 z3"),
        "tp2 z0": Case(Layout(1, 2, 0), save="tp2 z0"),
        **{f"bf16 z{stage}": Case(layout, save=f"bf16 z{stage}") for stage, layout in BF16.items()},
        **{f"bf16 z3 to z{stage}": Case(layout, load="bf16 z3") for stage, layout in BF16.items()},
        **{f"bf16 z{stage} to z3": Case(BF16[3], load=f"bf16 z{stage}") for stage in range(3)},
    },
    {
        f"{name} to single": Case(SINGLE, load=name)
        for name in ("dp2 tp2 z3", "dp2 z1", "dp2 z2", "dp2 z3", "dp2 z3 kept", "dp2 z3 subgroups", "tp2 z0")
    },
]
CASES = {name: case for start in STARTS for name, case in start.items()}


def build_model() -> nn.Module:
    """Split in rows and in columns, replicated, a single value, and sizes that neither dp nor the padding divides."""
    from megatron.core import tensor_parallel as tp
    from megatron.core.model_parallel_config import ModelParallelConfig

    config = ModelParallelConfig(use_cpu_initialization=True, params_dtype=torch.float32)
    options: dict[str, Any] = {"config": config, "init_method": lambda w: nn.init.normal_(w, std=0.1)}

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = tp.VocabParallelEmbedding(VOCABULARY, WIDTH, **options)
            self.norm = nn.LayerNorm(WIDTH)
            self.column = tp.ColumnParallelLinear(WIDTH, 32, bias=True, gather_output=False, **options)
            self.row = tp.RowParallelLinear(
                32, WIDTH, bias=False, input_is_parallel=True, skip_bias_add=False, **options
            )
            self.narrow, self.widen = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH)
            self.scale = nn.Parameter(torch.ones(1))
            self.head = tp.ColumnParallelLinear(WIDTH, VOCABULARY, bias=False, gather_output=False, **options)

        def forward(self, ids: Tensor) -> Tensor:
            h = self.embedding(ids)
            h = h + self.row(F.silu(self.column(self.norm(h))[0]))[0]
            h = h + self.scale * self.widen(F.silu(self.narrow(h)))
            logits = self.head(h)[0]
            return tp.vocab_parallel_cross_entropy(logits.float(), ids.roll(-1, 1)).mean()

    return Toy()


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Three learning rates x two weight decays."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for index, parameter in enumerate(model.parameters()):
        is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        key = (LEARNING_RATES[index % 3], WEIGHT_DECAYS[0 if is_matrix else 1])
        groups.setdefault(key, []).append(parameter)
    assert len(groups) == 6
    return [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()]


def deepspeed_config(layout: Layout) -> dict[str, Any]:
    zero = {"stage": layout.stage, "sub_group_size": layout.sub_group_size}
    if layout.persistence_threshold is not None:
        zero["stage3_param_persistence_threshold"] = layout.persistence_threshold
    config = {"train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9, "zero_optimization": zero}
    config["gradient_clipping"] = 1.0
    if layout.bf16:
        config["bf16"] = {"enabled": True}
        if layout.stage == 1:  # DeepSpeed takes its own bf16 optimizer then, instead of ZeRO's
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    if not layout.client_optimizer:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1.0, "torch_adam": True}}
    return config


def build_engine(layout: Layout) -> tuple[Any, Topology]:
    import deepspeed
    from megatron.core import parallel_state

    from trainer.engine import MegatronGroups

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=layout.tp)
    dp_group = parallel_state.get_data_parallel_group()
    config = deepspeed_config(layout)
    torch.manual_seed(0)
    # Without a dtype of its own: zero.Init takes dtype=torch.float32 for bfloat16 on a CPU.
    with deepspeed.zero.Init(data_parallel_group=dp_group, config_dict_or_path=config, enabled=layout.stage == 3):
        model = build_model()
    groups = parameter_groups(model)
    optimizer = {"optimizer": torch.optim.AdamW(groups)} if layout.client_optimizer else {"model_parameters": groups}
    engine, *_ = deepspeed.initialize(model=model, config=config, mpu=MegatronGroups(), **optimizer)
    dp_rank, tp_rank = dist.get_rank(dp_group), parallel_state.get_tensor_model_parallel_rank()
    return engine, Topology(dist.get_rank(), layout.world_size, dp_rank, layout.dp, tp_rank, layout.tp, dp_group)


def train(engine: Any, topology: Topology, steps: range) -> list[float]:
    """Loss of the global batch at each step; the batch is a function of the step alone."""
    losses = []
    for step in steps:
        ids = torch.randint(VOCABULARY, (GLOBAL_ROWS, SEQ_LEN), generator=torch.Generator().manual_seed(step))
        loss = engine(ids.chunk(topology.dp_size)[topology.dp_rank])
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total, group=topology.dp_group)
        losses.append(float(total) / topology.dp_size)
    return losses


def assembled(path: Path) -> dict[str, Tensor]:
    """Every weight and moment of a checkpoint, whole, and Adam's counts."""
    reader = FragmentReader(path)
    tensors = {}
    for name, shape in reader.shapes().items():
        for kind in ("weight", *MOMENTS):
            tensors[f"{name}|{kind}"] = reader.read(whole(name, shape), kind).view(shape)
        tensors[f"{name}|num_updates"] = torch.tensor(reader.num_updates(name))
    return tensors


def model_weights(engine: Any) -> dict[str, Tensor]:
    """What the model computes with (tensor-parallel shards of this rank), gathered by DeepSpeed itself."""
    import deepspeed

    is_partitioned = hasattr(next(engine.module.parameters()), "ds_id")
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=is_partitioned):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def deepspeed_state(engine: Any) -> dict[str, Tensor]:
    """The same as `assembled`, through DeepSpeed's own gathering (ZeRO 1 to 3, no tensor parallelism)."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed 0.19 links after the first parameter group's first step, before the other groups have any state.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    tensors = {}
    for name, p in engine.module.named_parameters():
        tensors[f"{name}|weight"] = safe_get_full_fp32_param(p).clone()
        for kind in MOMENTS:
            tensors[f"{name}|{kind}"] = safe_get_full_optimizer_state(p, kind).clone()
    return tensors


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    engine, topology = build_engine(case.layout)
    result: dict[str, Any] = {"start": model_weights(engine)}
    if case.save:
        result["losses"] = train(engine, topology, range(NUM_BEFORE))
        save_checkpoint(folder / case.save, engine, topology, NUM_BEFORE, {}, {})
        if case.layout.tp == 1 and case.layout.stage:
            result["deepspeed"] = deepspeed_state(engine)
    if case.load:
        path = folder / case.load / "checkpoints" / f"step-{NUM_BEFORE:08d}"
        load_checkpoint(path, engine, topology)
        result["resaved"] = save_checkpoint(folder / f"resaved {case}", engine, topology, 1, {}, {})
    result["middle"] = model_weights(engine)
    after = train(engine, topology, range(NUM_BEFORE, NUM_BEFORE + NUM_AFTER))
    result["losses"] = result.get("losses", []) + after
    result["end_state"] = assembled(save_checkpoint(folder / f"end {case}", engine, topology, 1, {}, {}))
    engine.destroy()
    return result


def run_start(cases: dict[str, Case], folder: Path) -> dict[str, dict[str, Any]]:
    import logging

    logging.disable(logging.WARNING)
    return {name: run_case(case, folder) for name, case in cases.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Of every case, the results by rank."""
    gathered = {}
    for cases in STARTS:
        world_size = next(iter(cases.values())).layout.world_size
        by_rank = run_distributed(run_start, world_size, cases, folder)
        gathered |= {name: [result[name] for result in by_rank] for name in cases}
    return gathered


SAVES = [name for name, case in CASES.items() if case.save]
LOADS = [name for name, case in CASES.items() if case.load]


def saved_path(folder: Path, name: str | None) -> Path:
    return folder / str(name) / "checkpoints" / f"step-{NUM_BEFORE:08d}"


def assert_bit_identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


@pytest.mark.parametrize("name", [name for name in SAVES if CASES[name].layout.tp == 1 and CASES[name].layout.stage])
def test_the_files_hold_what_deepspeed_gathers(results: dict[str, Any], folder: Path, name: str) -> None:
    stored = {key: value for key, value in assembled(saved_path(folder, name)).items() if "num_updates" not in key}
    assert_bit_identical(stored, results[name][0]["deepspeed"])


@pytest.mark.parametrize("name", SAVES)
def test_every_value_is_stored_once_and_all_ranks_share_the_work(
    results: dict[str, Any], folder: Path, name: str
) -> None:
    path, layout = saved_path(folder, name), CASES[name].layout
    weights = dict(read_weights(path))
    sizes = [file.stat().st_size for file in sorted(path.glob("*.safetensors"))]
    assert sum(sizes) < 3 * 4 * sum(weight.numel() for weight in weights.values()) + 8000 * layout.world_size
    assert len(sizes) == layout.world_size
    if layout.stage:
        assert max(sizes) < 2 * min(sizes)


@pytest.mark.parametrize("name", LOADS)
def test_weights_moments_and_counts_survive_any_layout_bit_for_bit(
    results: dict[str, Any], folder: Path, name: str
) -> None:
    before = assembled(saved_path(folder, CASES[name].load))
    assert_bit_identical(before, assembled(results[name][0]["resaved"]))
    # ZeRO-0 in bf16 begins with an update by zero gradients, to create Adam's state.
    num_updates = NUM_BEFORE + (CASES[name].load == "bf16 z0")
    assert {int(value) for key, value in before.items() if "num_updates" in key} == {num_updates}


@pytest.mark.parametrize("name", [name for name in LOADS if CASES[name].layout.tp == 1])
def test_the_model_computes_with_the_loaded_weights(results: dict[str, Any], folder: Path, name: str) -> None:
    stored = dict(read_weights(saved_path(folder, CASES[name].load)))
    for of_rank in results[name]:
        computing = of_rank["middle"]
        assert_bit_identical(computing, {key: stored[key].to(computing[key].dtype) for key in computing})


@pytest.mark.parametrize("name", [name for name in LOADS if name.endswith("again")])
def test_the_same_layout_goes_on_bit_for_bit(results: dict[str, Any], name: str) -> None:
    for unbroken, resumed in zip(results[str(CASES[name].load)], results[name], strict=True):
        assert resumed["losses"] == unbroken["losses"][NUM_BEFORE:]
        assert_bit_identical(resumed["end_state"], unbroken["end_state"])


@pytest.mark.parametrize("name", [name for name in LOADS if not CASES[name].layout.bf16])
def test_training_goes_on_as_in_one_unbroken_process(results: dict[str, Any], name: str) -> None:
    """Losses within 1e-5; every parameter within 1e-3 of the distance it has moved (fp32 sums in another order)."""
    single = results["single"][0]
    assert results[name][0]["losses"] == pytest.approx(single["losses"][NUM_BEFORE:], rel=1e-5)
    start, unbroken, resumed = single["start"], single["end_state"], results[name][0]["end_state"]
    for key, weight in start.items():
        end = unbroken[f"{key}|weight"]
        assert torch.norm(resumed[f"{key}|weight"] - end) <= 1e-3 * torch.norm(end - weight), key


@pytest.mark.parametrize("name", [name for name in LOADS if CASES[name].layout.bf16])
def test_bf16_goes_on_at_another_stage(results: dict[str, Any], name: str) -> None:
    """The first loss sees the same bf16 weights; the later ones differ by how each stage rounds its gradients."""
    unbroken, resumed = results[str(CASES[name].load)][0]["losses"][NUM_BEFORE:], results[name][0]["losses"]
    assert resumed[0] == pytest.approx(unbroken[0], rel=1e-6)
    assert resumed == pytest.approx(unbroken, rel=2e-2)
