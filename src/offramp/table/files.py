"""Files that are whole or absent: a versioned JSON page beside a safetensors file that it names and hashes."""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from offramp.errors import FileFormatError, OfframpError

__all__ = ["read_json", "read_tensors", "write_atomic", "write_tensors"]


def write_atomic(path: Path | str, data: bytes | str) -> Path:
    """Write a file so that a reader sees the old content or the new, never a part; a full disk leaves the old one."""
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; a table is shared like any other file of its folder
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise OfframpError(
            expected=f"{len(content)} bytes of room for {path}" if full else f"to write {path}",
            got="a full disk" if full else str(error), where="saving",
            todo="free some space or choose another folder; nothing was half-written." if full
            else "check the folder and its permissions; nothing was half-written.",
        ) from error
    return path


def write_tensors(page: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write ``page`` (JSON) and the tensors beside it, in a file named by its hash; renaming the page commits both."""
    data = safetensors.torch.save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    payload = page.with_name(f"{page.stem}-{digest[:12]}.safetensors")
    existed = payload.exists()
    write_atomic(payload, data)
    try:
        write_atomic(page, json.dumps({**record, "tensors": {"file": payload.name, "sha256": digest}}, indent=1,
                                      allow_nan=False) + "\n")
    except (OfframpError, TypeError, ValueError):
        if not existed:
            payload.unlink(missing_ok=True)
        raise
    for stale in page.parent.glob(f"{page.stem}-{'[0-9a-f]' * 12}.safetensors"):
        if stale != payload:
            stale.unlink(missing_ok=True)


def read_json(path: Path, *, format: str, version: int) -> dict[str, Any]:
    """Read a page of one ``format``; refuses what is not JSON, of another format, or written by a later offramp."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileFormatError(expected=f"a file of {format}", got=f"nothing at {path}", where="loading",
                              todo="check the path.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _damaged(path, format, str(error)) from error
    if not isinstance(record, dict) or record.get("format") != format:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise FileFormatError(expected=f"format {format!r}", got=f"{found!r} in {path}", where="loading")
    if not isinstance(record.get("version"), int) or record["version"] < 1:
        raise _damaged(path, format, f"version {record.get('version')!r}")
    if record["version"] > version:
        raise FileFormatError(
            expected=f"version {version} or older", got=f"version {record['version']} in {path}", where="loading",
            todo="upgrade offramp: the file was written by a later one.",
        )
    return record


def read_tensors(page: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the tensors that a page names, after checking their hash; runs no code from the file."""
    named = record.get("tensors")
    file = named.get("file") if isinstance(named, dict) else None
    if not isinstance(named, dict) or not isinstance(file, str) or Path(file).name != file:
        raise _damaged(page, "tensors", f"{named!r} does not name a file beside it")
    path = page.with_name(file)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileFormatError(expected=f"{path.name} beside {page}", got=str(error), where="loading",
                              todo="copy both files together.") from error
    if hashlib.sha256(data).hexdigest() != named.get("sha256"):
        raise _damaged(path, "tensors", "another hash than its page says")
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, "tensors", str(error)) from error
    return tensors


def _damaged(path: Path, format: str, why: str) -> FileFormatError:
    return FileFormatError(expected=f"an undamaged {format}", got=f"{path}: {why}", where="loading",
                           todo="copy or record it again.")


def _umask() -> int:
    # reading the mask means setting it; 0o022 back at once is the best that POSIX offers a library
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
