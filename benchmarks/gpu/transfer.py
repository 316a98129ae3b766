"""What goes to a machine that is lent for minutes and what comes back: the checkout with its library, and one archive."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

MOST_THERE = 64 << 20
MOST_BACK = 16 << 20
LEFT_OUT = "left-out.txt"
CARRIED = "fastseq/lib/libfastseq.so"  # git ignores it, and building it there would take the time that there is


def travels(root: Path) -> dict[str, int]:
    """Bytes of every file that goes there: what git tracks or would, and the library if it is built.

    Raises:
        OSError: if this is no checkout, or there is no git.
        ValueError: if git does not answer.
    """
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"git cannot list {root}: {done.stderr.strip()}")
    names = [*filter(None, done.stdout.split("\0")), CARRIED]
    return {name: (root / name).lstat().st_size for name in dict.fromkeys(names) if os.path.lexists(root / name)}


def too_large(sizes: dict[str, int]) -> str:
    """Why these files cannot go there, with the largest of them; empty if they can."""
    total = sum(sizes.values())
    if total <= MOST_THERE:
        return ""
    largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
    named = ", ".join(f"{name} {_mib(sizes[name])}" for name in largest)
    return f"what travels has {_mib(total)}, and {_mib(MOST_THERE)} may: {named}"


def archive(folder: Path, file: Path, most: int = MOST_BACK) -> list[str]:
    """Write all of a folder to a .tar.gz of ``most`` bytes, whole or not at all; the files that it has no room for, the largest.

    Raises:
        OSError: if it cannot be written.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path != file)
    names.sort(key=lambda name: (folder / name).stat().st_size)
    left: list[str] = []
    while len(packed := _packed(folder, names, left)) > most and names:
        left.append(names.pop())
    part = file.with_name(file.name + ".part")
    part.write_bytes(packed)
    os.replace(part, file)
    return left


def _packed(folder: Path, names: list[str], left: list[str]) -> bytes:
    room = io.BytesIO()
    with tarfile.open(fileobj=room, mode="w:gz", compresslevel=6) as tar:
        for name in names:
            tar.add(folder / name, arcname=f"{folder.name}/{name}")
        if left:
            text = "".join(f"{name}: {_mib((folder / name).stat().st_size)}\n" for name in left).encode()
            entry = tarfile.TarInfo(f"{folder.name}/{LEFT_OUT}")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text))
    return room.getvalue()


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
