"""Results of other packages as JSON files beside the scripts that made them: tensors as nested lists, exact in fp64."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Tree = Any  # dicts of them, or tensors


def as_lists(value: Tree) -> Any:
    if isinstance(value, dict):
        return {name: as_lists(each) for name, each in value.items()}
    return value.tolist() if value.dtype == torch.int64 else value.double().tolist()


def as_tensors(value: Any) -> Tree:
    if isinstance(value, dict):
        return {name: as_tensors(each) for name, each in value.items()}
    tensor = torch.tensor(value, dtype=torch.float64)
    return tensor.long() if _whole(value) else tensor


def _whole(value: Any) -> bool:
    return all(map(_whole, value)) if isinstance(value, list) else isinstance(value, int)


def read(script: str) -> Tree:
    """The results beside a script, by its ``__file__``."""
    return as_tensors(json.loads(Path(script).with_suffix(".json").read_text())["results"])


def main(script: str, doc: str | None, said: dict[str, str], found: Callable[[], Tree]) -> None:
    """Writes what ``found`` finds, and ``said`` (package, version, license) with the command, beside the script."""
    if sys.argv[1:] != ["--write"]:
        sys.exit(doc)
    path = Path(script)
    said = said | {"command": f"python -m oracles.{path.stem} --write"}
    path.with_suffix(".json").write_text(json.dumps(said | {"results": as_lists(found())}) + "\n")


def weighted(*outputs: torch.Tensor) -> torch.Tensor:
    """A loss in which every element has a weight of its own."""
    return sum((y * torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()).sum() for y in outputs)  # type: ignore[return-value]
