"""Checkpoint folders of a run: names, manifests, which one is whole and newest, and removing old ones.

<run>/checkpoints/latest                    name of the folder to resume from
<run>/checkpoints/step-00000100/            visible under this name only when whole
<run>/checkpoints/step-00000200.partial/    being written, or left by a run that was killed
<run>/checkpoints/step-00000050.removed/    being deleted
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm

from conf import UserError
from models.weights.fragment_files import write_json

FORMAT = 2
DIGEST = "xxh3_128"
MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest"
PARTIAL, REMOVED = ".partial", ".removed"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedState:
    """What is in state.json. state: the caller's dict. permanent: never pruned."""

    step: int
    dp_size: int
    tp_size: int
    permanent: bool
    state: dict[str, Any]


def checkpoint_path(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step-{step:08d}"


def partial_path(final: Path) -> Path:
    return final.with_name(final.name + PARTIAL)


def rank_state_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_state-{rank:05d}.json"


def start_partial(final: Path) -> None:
    """Make the empty folder to write into. What killed runs and failed saves have left goes: it takes the room."""
    _delete_leftovers(final.parent)
    partial_path(final).mkdir(parents=True)


def new_digest() -> xxhash.xxh3_128:
    """Against accidents. A cryptographic one takes longer than everything else that a checkpoint does."""
    return xxhash.xxh3_128()


def describe_file(path: Path) -> dict[str, Any]:
    """Size in bytes and digest, read back from the file system."""
    digest = new_digest()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"size": path.stat().st_size, DIGEST: digest.hexdigest()}


def commit(final: Path, files: dict[str, dict[str, Any]]) -> None:
    """Make the partial folder the latest checkpoint: manifest, then the final name, then `latest`.

    files: `describe_file` of every file, computed by the ranks that wrote them.
    A checkpoint of the same step (of an earlier attempt) is moved away first; if the run is killed between the two
    renames, the one before it is found.
    """
    partial = partial_path(final)
    for name, facts in files.items():
        written = partial / name
        if not written.is_file() or written.stat().st_size != facts["size"]:
            raise UserError(
                f"{written} is not what its rank wrote: put the run folder where all nodes see the same files"
            )
    write_json(partial / MANIFEST, {"format": FORMAT, "files": files})
    _flush_folder(partial)
    if final.exists():
        _remove(final)
    partial.rename(final)
    _flush_folder(final.parent)
    _point_latest(final)


def find_damage(path: Path, digests: bool = True, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint folder, by its manifest; None if it is whole.

    digests=False looks at names and sizes only, which takes no time. share: (i, n), look at every n-th file from the
    i-th on.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT}"
        files = sorted((str(name), facts["size"], facts[DIGEST]) for name, facts in manifest["files"].items())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{MANIFEST} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    own = files[share[0] :: share[1]]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        checks = [pool.submit(_file_damage, path, name, size, digest, digests) for name, size, digest in own]
        bar = tqdm(checks, desc=f"verifying {path.name}", unit="file", delay=5, disable=not digests or share[0] > 0)
        return next((damage for damage in (check.result() for check in bar) if damage), None)


def find_latest(run_folder: Path) -> Path | None:
    """The whole checkpoint to resume from: the one `latest` names, else the next older, else any; None if there is none
    at all. Reads every byte of what it returns. UserError if there are some and none is whole."""
    return first_whole(candidates(run_folder))


def first_whole(
    paths: list[Path],
    examine: Callable[[Path], str | None] = find_damage,
    warn: Callable[..., None] = log.warning,
) -> Path | None:
    """The first that is not damaged. examine: as `find_damage`. warn: of each that is."""
    damages = []
    for path in paths:
        damage = examine(path)
        if damage is None:
            return path
        damages.append(f"{path.name}: {damage}")
        warn("checkpoint %s cannot be used (%s); looking for an older one", path, damage)
    if damages:
        raise UserError(
            f"{paths[0].parent} has no checkpoint that can be used ({'; '.join(damages[:3])}): put a copy of one "
            "there, go on with the version of this program that wrote them, or choose another run_dir"
        )
    return None


def candidates(run_folder: Path, before: int | None = None) -> list[Path]:
    """Checkpoints in the order to try. before: only of an earlier step than this.

    Steps beyond `latest` belong to an attempt that was given up, or was killed just before.
    """
    folder = run_folder / "checkpoints"
    paths, latest = _by_step(folder), _latest_name(folder)
    if latest is not None:
        if folder / latest not in paths:
            log.warning("%s names %s, which is not there; looking for an older one", folder / LATEST, latest)
        paths = [path for path in paths if path.name <= latest] + [path for path in paths if path.name > latest]
    return [path for path in paths if before is None or int(path.name[5:]) < before]


def prune(run_folder: Path, keep: int) -> list[Path]:
    """Delete all but the newest `keep` rolling checkpoints up to `latest`; permanent ones stay. Returns what went.

    Those beyond `latest` are of an attempt that was given up: they go. What cannot be deleted is left for the next
    time, with a warning. Call it on one rank while no checkpoint is being written: leftovers of killed runs are deleted
    too.
    """
    assert keep >= 1
    folder = run_folder / "checkpoints"
    _delete_leftovers(folder)
    latest = _latest_name(folder)
    rolling = [path for path in _by_step(folder) if not _is_permanent(path)]
    given_up = [path for path in rolling if latest is not None and path.name > latest]
    surplus = given_up + [path for path in rolling if path not in given_up][keep:]
    return [path for path in surplus if path.name != latest and _remove_if_possible(path)]


def _file_damage(folder: Path, name: str, size: int, digest: str, digests: bool) -> str | None:
    path = folder / name
    if Path(name).name != name:
        return f"{MANIFEST} names a file outside the folder, {name!r}"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != size:
        return f"{name} has {path.stat().st_size} bytes instead of {size}"
    try:
        if digests and describe_file(path)[DIGEST] != digest:
            return f"{name} has changed since it was written"
    except OSError as error:  # a bad sector, or no permission
        return f"{name} cannot be read: {error.strerror}"
    return None


def _by_step(folder: Path) -> list[Path]:
    """Folders with a final name, newest first."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit()), reverse=True)


def _latest_name(folder: Path) -> str | None:
    latest = folder / LATEST
    return latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else None


def _point_latest(final: Path) -> None:
    temporary = final.with_name(LATEST + PARTIAL)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(final.name + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(final.with_name(LATEST))
    _flush_folder(final.parent)


def _is_permanent(path: Path) -> bool:
    """A folder that cannot be read is not deleted as rolling would be, but kept for someone to look at."""
    try:
        return bool(json.loads((path / STATE).read_text(encoding="utf-8"))["permanent"])
    except (OSError, ValueError, KeyError):
        return True


def _remove(path: Path) -> None:
    """Rename first, so that a kill half-way does not leave a damaged checkpoint under a final name."""
    removed = path.with_name(path.name + REMOVED)
    if removed.exists():
        shutil.rmtree(removed)
    path.rename(removed)
    _delete(removed)


def _remove_if_possible(path: Path) -> bool:
    try:
        _remove(path)
    except OSError as error:
        log.warning("%s could not be deleted (%s)", path, error.strerror)
        return False
    return True


def _delete_leftovers(folder: Path) -> None:
    for leftover in [*folder.glob(f"step-*{PARTIAL}"), *folder.glob(f"step-*{REMOVED}")]:
        _delete(leftover)


def _delete(folder: Path) -> None:
    """As far as possible: over the network a file that someone still reads cannot go."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s could not be deleted (%s)", folder, error.strerror)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
