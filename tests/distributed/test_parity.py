"""One process without DeepSpeed against data- and tensor-parallel ones at every ZeRO stage: the same gradients, losses,
weights.

The rows of some layouts are laid by hand: ranks differ in text and image targets, and in some steps one of them, or
each, has no image. Those of the others come from real shards. `make test-matrix` runs every (dp, tp) at every stage.
"""

from __future__ import annotations

import pytest
import torch

from data_pipelines.loader import open_indexes
from tests.conftest import REAL_DATA
from tests.distributed.harness import run_distributed
from tests.distributed.parity import NUM_ROWS, Layout, Run, count_targets, make_config, rows_of_step, run_all
from tests.distributed.parity import batch_by_hand as by_hand
from tests.models.tiny_emu import IMG
from tests.trainer.tiny_job import MODEL
from trainer.config import PretrainConfig, compose_config, fill_vocabulary

pytestmark = pytest.mark.slow

GRADIENT_TOLERANCE, LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-4, 1e-5, 1e-3
NEED_REAL_DATA = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason=f"no real shards at {REAL_DATA}: set EMU_REAL_DATA to a folder that has them"
)

BY_HAND = {
    **{f"1 process, ZeRO-{stage}": Layout(1, 1, stage, 4) for stage in range(4)},
    **{f"1 process, ZeRO-{stage}, 4 micro-batches": Layout(1, 1, stage) for stage in (0, 3)},
    **{f"1 process, ZeRO-{stage}, from scratch": Layout(1, 1, stage, 2, "from scratch") for stage in (0, 3)},
    "1 process, ZeRO-0, selective": Layout(1, 1, 0, 2, recompute="selective"),
    "1 process, ZeRO-3, full": Layout(1, 1, 3, 2, recompute="full"),
    **{f"dp 2, ZeRO-{stage}": Layout(2, 1, stage, 2) for stage in range(4)},
    **{f"dp 2, ZeRO-{stage}, 2 micro-batches": Layout(2, 1, stage) for stage in range(4)},
    **{f"dp 2, ZeRO-{stage}, from scratch": Layout(2, 1, stage, 2, "from scratch") for stage in (0, 3)},
    "dp 2, ZeRO-3, from scratch, 2 micro-batches": Layout(2, 1, 3, 1, "from scratch"),
    "dp 2, ZeRO-3, from scratch, full": Layout(2, 1, 3, 1, "from scratch", recompute="full"),
    "dp 2, ZeRO-3, small weights kept": Layout(2, 1, 3, 2, persistence_threshold=100_000),
    "dp 2, ZeRO-3, full": Layout(2, 1, 3, 1, recompute="full"),
    "dp 2, ZeRO-3, selective, small weights kept": Layout(2, 1, 3, 2, "paper", 100_000, "selective"),
    "dp 2, ZeRO-1, optimizer offloaded": Layout(2, 1, 1, 2, offload=("cpu", "none")),
    "dp 2, ZeRO-3, all offloaded": Layout(2, 1, 3, 1, offload=("cpu", "cpu")),
    **{f"tp 2, ZeRO-{stage}": Layout(1, 2, stage, 2) for stage in range(4)},
    "tp 2, ZeRO-3, from scratch": Layout(1, 2, 3, 2, "from scratch"),
    "tp 2, ZeRO-2, full": Layout(1, 2, 2, 2, recompute="full"),
    "tp 2, ZeRO-3, sequence": Layout(1, 2, 3, 2, sequence=True),
    **{f"dp 2, tp 2, ZeRO-{stage}": Layout(2, 2, stage) for stage in (0, 1, 3)},
    "dp 2, tp 2, ZeRO-2, from scratch": Layout(2, 2, 2, 2, "from scratch"),
    "dp 2, tp 2, ZeRO-1, sequence, selective": Layout(2, 2, 1, 1, recompute="selective", sequence=True),
    "dp 2, tp 2, ZeRO-3, from scratch, full": Layout(2, 2, 3, 1, "from scratch", recompute="full"),
}
BF16 = {
    "dp 2, ZeRO-3, bf16": Layout(2, 1, 3, 2, precision="bf16", recompute="full"),
    "dp 2, ZeRO-1, bf16": Layout(2, 1, 1, 1, precision="bf16"),
    "tp 2, ZeRO-2, bf16": Layout(1, 2, 2, 2, precision="bf16", recompute="selective"),
}
WORLDS = ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4))
MATRIX = {
    f"real rows, dp {dp}, tp {tp}, ZeRO-{stage}": Layout(dp, tp, stage, 1 + (dp < 4 and stage % 2), real=True)
    for dp, tp in WORLDS
    for stage in range(4)
}
# Of those by hand: every (dp, tp), stage, objective and option at least once.
COVER_BY_HAND = [
    "1 process, ZeRO-0",
    "1 process, ZeRO-3, 4 micro-batches",
    "1 process, ZeRO-0, selective",
    "dp 2, ZeRO-0",
    "dp 2, ZeRO-1, 2 micro-batches",
    "dp 2, ZeRO-2, 2 micro-batches",
    "dp 2, ZeRO-3, from scratch, full",
    "dp 2, ZeRO-3, small weights kept",
    "dp 2, ZeRO-3, all offloaded",
    "tp 2, ZeRO-3, sequence",
    "tp 2, ZeRO-2, full",
    "dp 2, tp 2, ZeRO-2, from scratch",
    "dp 2, tp 2, ZeRO-1, sequence, selective",
]
# Of the real ones: every (dp, tp), every stage, and every stage with and without both kinds of parallelism.
COVER = [(1, 1, 0), (2, 1, 3), (4, 1, 2), (4, 1, 0), (1, 2, 1), (2, 2, 3), (1, 4, 3), (1, 4, 0)]
ALL = BY_HAND | MATRIX
LAYOUTS = {
    *COVER_BY_HAND,
    *(name for name, layout in MATRIX.items() if (layout.dp, layout.tp, layout.stage) in COVER),
}
CASES = [
    pytest.param(
        name,
        marks=[NEED_REAL_DATA] * layout.real + [pytest.mark.matrix] * (name not in LAYOUTS),
    )
    for name, layout in ALL.items()
]


@pytest.fixture(scope="module")
def real_job(tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig | None:
    """A job on the real shards of all sources, for the smallest model that four tensor-parallel ranks can share."""
    if not REAL_DATA.is_dir():
        return None
    sizes = {"seq_len": 256, "max_images_per_row": 16, "lanes": 4, "global_batch_rows": NUM_ROWS, "window_rows": 4}
    overrides = [
        *MODEL,
        "model.language_model.num_kv_heads=4",
        "data=corpora",
        *(f"data.sources.{name}.weight=1" for name in ("laion", "laion_coco", "mmc4", "webvid", "storyboard")),
        *(f"data.{name}={value}" for name, value in sizes.items()),
        "data.num_workers=0",
        f"data.index_dir={tmp_path_factory.mktemp('index')}",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMU_DATA", str(REAL_DATA))
        config = compose_config(overrides)
    fill_vocabulary(config)
    open_indexes(config.data, build_missing=True)
    return config


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, real_job: PretrainConfig | None) -> dict[str, list[Run]]:
    """Of the layouts whose tests are to run."""
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    wanted = {item.callspec.params.get("name") for item in here}
    layouts = {name: layout for name, layout in (ALL | BF16).items() if name in wanted}
    return run_all({name: v for name, v in layouts.items() if real_job or not v.real}, real_job, run_distributed)


def reference(results: dict[str, list[Run]], name: str) -> Run:
    layout = (ALL | BF16)[name]
    return results["real " * layout.real + layout.objective][0]


def test_the_steps_have_what_they_are_for() -> None:
    """Unequal target counts on the ranks, a rank without images, and steps with none at all."""
    images = [[sum(d.ids.count(IMG) for d in row) for row in rows_of_step(step)] for step in range(4)]
    assert [(sum(counts[:2]), sum(counts[2:])) for counts in images] == [(7, 0), (0, 7), (3, 5), (0, 0)]
    config = make_config(BY_HAND["1 process, ZeRO-0"], None)
    counts = [count_targets(by_hand(step, 0, NUM_ROWS), config) for step in range(4)]
    assert all(text > 0 for text, _ in counts) and counts[3][1] == 0


def test_broken_and_left_out_samples_are_there_to_be_counted(results: dict[str, list[Run]]) -> None:
    assert results["paper"][0].skips == {"source 0: broken": 5, "source 0: left out": 40}


@NEED_REAL_DATA
def test_real_rows_differ_in_what_they_hold(results: dict[str, list[Run]]) -> None:
    counts = results["real paper"][0].counts
    assert len(set(counts)) == len(counts)
    assert all(text > 100 and image > 30 for text, image in counts)


@pytest.mark.parametrize("name", CASES)
def test_start_and_counts(results: dict[str, list[Run]], name: str) -> None:
    """The same weights whatever they are split over: zero.Init and tensor-parallel shards included."""
    expected = reference(results, name)
    for run in results[name]:
        assert (run.counts, run.samples, run.skips) == (expected.counts, expected.samples, expected.skips)
        assert run.start.keys() == expected.start.keys()
        for parameter, weight in expected.start.items():
            assert torch.equal(run.start[parameter], weight), parameter


@pytest.mark.parametrize("name", CASES)
def test_gradients(results: dict[str, list[Run]], name: str) -> None:
    expected = reference(results, name).gradients
    for run in results[name]:
        assert run.gradients.keys() == expected.keys()
        for parameter, gradient in expected.items():
            difference = torch.norm(run.gradients[parameter] - gradient)
            assert difference <= GRADIENT_TOLERANCE * torch.norm(gradient), parameter


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradient_norms(results: dict[str, list[Run]], name: str) -> None:
    expected = reference(results, name)
    for run in results[name]:
        torch.testing.assert_close(torch.tensor(run.losses), torch.tensor(expected.losses), atol=LOSS_TOLERANCE, rtol=0)
        assert run.norms == pytest.approx(expected.norms, rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_weights(results: dict[str, list[Run]], name: str) -> None:
    expected = reference(results, name)
    for run in results[name]:
        for parameter, weight in expected.weights.items():
            moved = torch.norm(weight - expected.start[parameter])
            assert moved > 0, parameter
            assert torch.norm(run.weights[parameter] - weight) <= WEIGHT_TOLERANCE * moved, parameter


@pytest.mark.parametrize("name", BF16)
def test_mixed_precision(results: dict[str, list[Run]], name: str) -> None:
    """bf16 has 8 bits: losses within 2 %, and the weights' steps, which are kept in fp32, in the same direction."""
    expected = reference(results, name)
    for run in results[name]:
        torch.testing.assert_close(torch.tensor(run.losses), torch.tensor(expected.losses), rtol=2e-2, atol=2e-2)
        assert run.counts == expected.counts
        moves = [(run.weights[n].float() - w, expected.weights[n] - w) for n, w in expected.start.items()]
        ours, theirs = (torch.cat([part.flatten() for part in parts]) for parts in zip(*moves, strict=True))
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9
