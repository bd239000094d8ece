"""A seeded sample of the mutations in fuzz.py, and that its checks can fail. EMU_FUZZ_CASES=2000 runs more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.document import Skip
from data_pipelines.reader import SourceReader
from data_pipelines.tokenizer import Tokenizer
from tests.data_pipelines import fuzz
from tests.data_pipelines.corpora import write_pairs
from tests.data_pipelines.fuzz import Corpus, examine
from tests.data_pipelines.fuzz import fuzz as run_fuzz
from tests.data_pipelines.fuzz_mutations import MUTATIONS, make_header, members_of

NUM_CASES = int(os.environ.get("EMU_FUZZ_CASES", "200"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "drawn"
    fuzz.make_drawn_corpora(folder)
    return folder


@pytest.mark.slow
def test_mutated_shards_lose_nothing_and_break_nothing(drawn: Path) -> None:
    findings = run_fuzz(drawn, first=0, number=NUM_CASES)
    assert not findings.failures, "\n".join(f"case {n}: {text}" for n, text in findings.failures.items())
    assert findings.results.total() == NUM_CASES
    assert len(findings.results) >= 4, "the mutations are too weak, or too strong"


@pytest.fixture
def pairs(tmp_path: Path) -> Corpus:
    tar = write_pairs(tmp_path / "pairs.tar", 0, 6).read_bytes()
    return Corpus("pairs.tar", "pairs", {}, tar, [])


def test_a_whole_shard_passes(pairs: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert examine(pairs, pairs.tar, tokenizer, tmp_path) == "broken picture"


def test_a_sample_lost_on_the_way_is_found(
    pairs: Corpus, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that forgets a sample when it reads on, and one that skips without counting the reason right."""
    document, calls = SourceReader.document, Counter[str]()

    def changing(self: SourceReader, key, epoch, sample):  # type: ignore[no-untyped-def]
        calls[sample.name] += 1
        return (
            Skip("lost") if calls[sample.name] == 1 and sample.name == "000001" else document(self, key, epoch, sample)
        )

    monkeypatch.setattr(SourceReader, "document", changing)
    with pytest.raises(AssertionError, match=r"other documents|skips"):
        examine(pairs, pairs.tar, tokenizer, tmp_path)


@pytest.mark.parametrize("mutation", sorted(set(MUTATIONS), key=lambda mutation: mutation.__name__))
def test_mutations_are_functions_of_their_seed(pairs: Corpus, mutation: Callable) -> None:
    results = [mutation(pairs.tar, np.random.default_rng(seed)) for seed in (1, 1, 2, 3, 4)]
    assert results[0] == results[1]
    assert any(result != pairs.tar for result in results)


def test_members_of_a_damaged_tar_end(pairs: Corpus) -> None:
    """Sizes below zero lead tarfile back to where it was."""
    first = members_of(pairs.tar)[0]
    circle = make_header("a.txt", -512) + pairs.tar[first.start :]
    assert len(members_of(make_header("b.txt", 0) + circle)) == 1


CHILD = """
import json, os, signal, sys
print(json.dumps([7, "begun", "a.tar flip"]), flush=True)
print(json.dumps([7, "ended", "whole"]), flush=True)
print(json.dumps([8, "begun", "b.tar flip"]), flush=True)
os.kill(os.getpid(), signal.SIGSEGV)
"""


def test_a_crash_is_a_finding_and_not_the_end(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[str] = []
    real = subprocess.Popen

    def popen(command: list[str], **options):  # type: ignore[no-untyped-def]
        starts.append(command[command.index("--first") + 1])
        if len(starts) == 1:
            return real([sys.executable, "-c", CHILD], **options)
        done = json.dumps([9, "begun", "x"]) + "\n" + json.dumps([9, "ended", "skips"])
        return real(["echo", done], **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    findings = run_fuzz(drawn, first=7, number=3)
    assert starts == ["7", "9"]
    assert list(findings.failures) == [8] and "b.tar flip: ended by SIGSEGV" in findings.failures[8]
    assert findings.results == Counter(whole=1, skips=1)
