"""What holds for every suite."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastseq.benchmarks.measure.case import Options
from fastseq.benchmarks.providers.registry import EVERY_PROVIDER
from fastseq.benchmarks.suites import SUITES, selection

PAGE = Path(__file__).resolve().parents[2] / "docs/benchmarks/index.md"


def plan(name, device, quick):
    return SUITES[name].plan(Options(device, "float32", (1,), quick))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", SUITES)
def test_a_suite_has_its_names_and_a_plan(name, device):
    suite = SUITES[name]
    assert suite.NAME == name and suite.SUMMARY
    assert all(callable(getattr(suite, part)) for part in ("plan", "derive", "present", "picture"))
    every, quick = plan(name, device, False), plan(name, device, True)
    assert 0 < len(quick) <= len(every)
    for case in (*every, *quick):
        assert case.suite == name and {p.provider for p in case.participants} <= set(EVERY_PROVIDER)
        assert len({(p.workload.mode, p.workload.threads, p.workload.device) for p in case.participants}) == 1
        assert len({p.provider for p in case.participants}) == len(case.participants)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", SUITES)
def test_rows_can_be_told_apart(name, device):
    """A run that goes on where it stopped, and a comparison of two runs, know a row by its key."""
    keys = [key for case in plan(name, device, True) for key in sorted(case.keys(), key=str)]
    assert len(keys) == len(set(keys))


def test_the_documentation_lists_every_suite():
    benchmarks = PAGE.read_text(encoding="utf-8").partition("\n## Suites\n")[2].partition("\n## ")[0]
    listed = [
        name for line in re.findall(r"^\| (`[a-z].*?) \|", benchmarks, re.MULTILINE) for name in re.findall(r"`(.*?)`", line)
    ]
    assert sorted(listed) == sorted(SUITES)


@pytest.mark.parametrize("name", SUITES)
def test_every_provider_can_be_chosen(name):
    """--only takes names apart at commas and spaces, and an underscore for a space."""
    cases = plan(name, "cpu", True)
    for provider in {p.provider for case in cases for p in case.participants}:
        wanted = selection.parse(f"provider={provider.replace(' ', '_')}")
        assert all(provider in {p.provider for p in case.participants} for case in selection.select(cases, wanted))
