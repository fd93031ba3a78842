"""Checkpoints on disk, which are whole or absent: written beside, flushed, listed with their bytes' SHA-256, then renamed."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from drpo.files import flush

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""Names, sizes and SHA-256 of a checkpoint's files, the fingerprint of the run that it is of, and when that began."""

FORMAT = 1
"""To be increased with every change of what :class:`~drpo.trainer.checkpointed.CheckpointedTrainer` writes and reads."""

PREFIX = "checkpoint-"
"""Transformers' name of a checkpoint, before the number of updates made."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged or of another run; the message is one line that says what is wrong with it."""


def unfinished(folder: Path) -> Path:
    """Where a run's checkpoint is written before it is whole; nothing in there is taken for a checkpoint."""
    return folder / ".unfinished"


def remove_unfinished(folder: Path) -> None:
    """Remove what a writer left that was killed or failed."""
    shutil.rmtree(unfinished(folder), ignore_errors=True)


def finish(checkpoint: Path, fingerprint: dict[str, Any], begun: float, checksums: bool) -> None:
    """Write the manifest of an unfinished checkpoint, and put it in place of what has its name.

    Args:
        checkpoint: its name to be.
        fingerprint: of the run.
        begun: when the run did, in seconds since 1970.
        checksums: flush the files to disk and note their SHA-256; without, their sizes alone are noted.
    """
    written = unfinished(checkpoint.parent) / checkpoint.name
    paths = sorted(path for path in written.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        descriptions = pool.map(_flush_and_describe if checksums else _describe, paths)
        files = {str(path.relative_to(written)): file for path, file in zip(paths, descriptions, strict=True)}
    content = {"format": FORMAT, "files": files, "fingerprint": fingerprint, "begun": begun}
    manifest = written / MANIFEST
    manifest.write_text(json.dumps({**content, "sha256": _digest(content)}, indent=1), encoding="utf-8")
    if checksums:
        flush(manifest)
        flush(written)
    if checkpoint.exists():
        os.rename(checkpoint, unfinished(checkpoint.parent) / "replaced")
    os.rename(written, checkpoint)
    if checksums:
        flush(checkpoint.parent)
    remove_unfinished(checkpoint.parent)


def verify(checkpoint: Path) -> dict[str, Any]:
    """Read every byte of a checkpoint and return what its manifest says.

    Raises:
        CheckpointError: it is not whole; the message names the file.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        content = {name: manifest[name] for name in ("format", "files", "fingerprint", "begun")}
        is_whole = manifest["sha256"] == _digest(content)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing, so nothing says that the checkpoint is whole") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not is_whole:
        raise CheckpointError(f"{path}: has not the bytes that were written")
    if content["format"] != FORMAT:
        raise CheckpointError(f"{path}: is of format {content['format']}; this version of drpo reads {FORMAT}")
    for name, written in content["files"].items():
        file = checkpoint / name
        try:
            if (size := file.stat().st_size) != written["size"]:
                raise CheckpointError(f"{file}: has {size} bytes; expected {written['size']}")
            if "sha256" not in written:
                continue
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{file}: {error.strerror or error}") from error
        if digest != written["sha256"]:
            raise CheckpointError(f"{file}: has not the bytes that were written")
    return content


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, whole or not."""
    numbered = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted((path for path in numbered if path.is_dir()), key=update_of)


def update_of(checkpoint: Path) -> int:
    """The number of updates made before a checkpoint was taken."""
    return int(checkpoint.name.removeprefix(PREFIX))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole, with a warning for each newer one that is not; None where there are none.

    A run that began later has newer ones than another in its folder, whatever their numbers.

    Raises:
        CheckpointError: there are checkpoints and none is whole.
    """
    mistakes: list[str] = []
    for checkpoint in sorted(checkpoints_in(folder), key=lambda path: (_begun(path), update_of(path)), reverse=True):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            mistakes.append(str(error))
            continue
        for mistake in mistakes:
            logger.warning("Going on from %s, since a newer one is damaged: %s.", checkpoint.name, mistake)
        return checkpoint
    if mistakes:
        raise CheckpointError(f"{folder}: holds no checkpoint that is whole: {'; '.join(mistakes)}")
    return None


def _begun(checkpoint: Path) -> float:
    """When a checkpoint's run began; infinity if its manifest cannot be read, so that it is examined first."""
    try:
        return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["begun"] + 0.0
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf


def delete_oldest(folder: Path, keep: int, but: set[Path]) -> None:
    """Delete what was written first until ``keep`` checkpoints are left, and none of ``but``; a kill leaves none in part."""
    by_age = sorted(checkpoints_in(folder), key=lambda path: path.stat().st_mtime_ns)
    others = [path for path in by_age if path not in but]
    for checkpoint in others[: max(0, len(by_age) - keep)]:
        unfinished(folder).mkdir(exist_ok=True)
        os.rename(checkpoint, unfinished(folder) / checkpoint.name)
        remove_unfinished(folder)


def check_same_run(checkpoint: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare the fingerprint in a checkpoint with the one of the run that wants to go on from it.

    Versions of packages that differ are warned of: another one may round differently, and have options more or less.

    Raises:
        CheckpointError: they differ; the message names the first field.
    """
    differences = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    versions = {name for name in differences if name.startswith("versions.")}
    options_of_versions = then.keys() ^ now.keys() if versions else set()
    for name in differences:
        message = f"{name} is {now.get(name)!r}, but the run of the checkpoint has {then.get(name)!r}"
        if name not in versions | options_of_versions:
            raise CheckpointError(
                f"{checkpoint}: {message}; to begin another run from its weights, give the folder as the model"
            )
        logger.warning("Resuming from %s: %s; the same numbers are not to be expected.", checkpoint.name, message)


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size}


def _flush_and_describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        os.fsync(stream.fileno())
    return {**_describe(path), "sha256": digest}


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
