"""What this machine has found out, kept between processes: a JSON file of each kind under ``~/.cache/fastseq``.

    {"schema": "fastseq-store", "version": 1, "kind": "tuned", "entries": {key: value, ...}}

``FASTSEQ_CACHE`` names another directory, or with ``off`` none; ``XDG_CACHE_HOME`` is heeded. Where nothing can be read, nothing
is known; where nothing can be written, what was found out holds for the process. A file is replaced as a whole, so that whoever
reads or is killed sees the old or the new one, and under a lock, so that two processes that add to it both are in it. The version
stands in the name as well: an older fastseq neither reads nor overwrites what a newer one keeps.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCHEMA, VERSION = "fastseq-store", 1
KINDS = ("tuned", "self_check")
LOCK_SECONDS = 10.0  # that another process may take to write

logger = logging.getLogger("fastseq")
_guard = threading.RLock()
_unwritten: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}  # what this process alone knows
_warned: set[str] = set()
_revision = 0


def directory() -> Path | None:
    """Where the files are, existing or not; None: nowhere."""
    chosen = os.environ.get("FASTSEQ_CACHE")
    if chosen == "off":
        return None
    try:
        if chosen:
            return Path(chosen).expanduser()
        parent = os.environ.get("XDG_CACHE_HOME", "")
        return (Path(parent) if os.path.isabs(parent) else Path.home() / ".cache") / "fastseq"
    except RuntimeError:  # this user has no home
        return None


def path(kind: str) -> Path | None:
    """The file of a kind.

    Raises:
        ValueError: if there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"the store has {' and '.join(KINDS)}, got {kind!r}")
    where = directory()
    return None if where is None else where / f"{kind}-{VERSION}.json"


def read(kind: str) -> dict[str, Any]:
    """The entries of a kind: {key: value}. A file that is no store of this version counts as empty, after one warning."""
    file = path(kind)
    with _guard:
        return (_entries(kind, file) or {}) | _unwritten[kind]


def update(kind: str, entries: Mapping[str, Any]) -> str | None:
    """Add entries, JSON-able, to a kind; they take the place of those under the same keys. None, or why they are only known
    to this process.

    Raises:
        TypeError, ValueError: if an entry cannot be written as JSON.
    """
    json.dumps(dict(entries), allow_nan=False)
    return _write(kind, dict(entries))


def clear(kind: str) -> str | None:
    """Forget all entries of a kind. None, or why the file is still there."""
    return _write(kind, None)


def revision() -> int:
    """A number that changes when this process writes: who remembers what it read asks again then."""
    return _revision


def document(kind: str, entries: Mapping[str, Any]) -> str:
    """The text of a file, an entry a line."""
    head = json.dumps({"schema": SCHEMA, "version": VERSION, "kind": kind})[:-1]
    lines = ",\n".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in sorted(entries.items()))
    return f'{head}, "entries": {{\n{lines}\n}}}}\n'


def parsed(text: str, kind: str) -> dict[str, Any]:
    """The entries in the text of a file.

    Raises:
        ValueError: if it is none of this schema, version and kind, saying what it is.
    """
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"it is truncated or no JSON: {error}") from error
    wanted = {"schema": SCHEMA, "version": VERSION, "kind": kind}
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f'it is not fastseq\'s ("schema" is not "{SCHEMA}")')
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(f'its "{name}" is {found.get(name)!r}, not {value!r}')
    if not isinstance(found.get("entries"), dict):
        raise ValueError('it has no "entries"')
    return found["entries"]


def _entries(kind: str, file: Path | None) -> dict[str, Any] | None:
    """None: the file is no store of this version, which is said once."""
    if file is None or not os.path.lexists(file):
        return {}
    try:
        if not file.is_file():
            raise ValueError("it is no regular file")
        return parsed(file.read_text(encoding="utf-8"), kind)
    except (OSError, ValueError) as error:
        if str(file) not in _warned:
            _warned.add(str(file))
            logger.warning("fastseq: %s is ignored: %s", file, _words(error))
        return None


def _write(kind: str, entries: dict[str, Any] | None) -> str | None:
    """Merge entries into a file; None: remove it."""
    global _revision
    file = path(kind)
    with _guard:
        _revision += 1
        try:
            if entries is None:
                _unwritten[kind] = {}
                if file is not None and os.path.lexists(file):
                    with _locked(file):
                        file.unlink(missing_ok=True)
                return None
            if file is None:
                raise OSError("there is no directory for it (FASTSEQ_CACHE=off, or no home)")
            file.parent.mkdir(parents=True, exist_ok=True)
            with _locked(file):
                known = _entries(kind, file)
                if known is None:  # what is no store of ours is somebody's
                    os.replace(file, file.with_name(file.name + ".ignored"))
                _replace(file, document(kind, (known or {}) | _unwritten[kind] | entries))
        except OSError as error:
            if entries is not None:
                _unwritten[kind] |= entries
            return f"{file or 'the store'} cannot be {'removed' if entries is None else 'written'}: {_words(error)}"
        _unwritten[kind] = {}
        return None


def _replace(file: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Within a ``with`` block no other process writes the file. A process that dies lets go of it."""
    with open(file.with_suffix(".lock"), "a") as stream:
        try:
            import fcntl
        except ImportError:  # Windows, where the last of two writers wins
            yield
            return
        since = time.monotonic()
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - since > LOCK_SECONDS:
                    raise OSError(f"another process has held {file.with_suffix('.lock')} for {LOCK_SECONDS:.0f} s") from None
                time.sleep(0.01)
        yield


def _words(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
