"""The store between processes: what is foreign, torn, unwritable or written twice at once."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys

import pytest

from fastseq.choice import store


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSEQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "_unwritten", {kind: {} for kind in store.KINDS})
    monkeypatch.setattr(store, "_warned", set())
    return tmp_path / "cache"


def python(code: str, **environment: str) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items()} | environment
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_entries_are_kept_added_to_replaced_and_forgotten(cache):
    assert store.read("tuned") == {} and not cache.exists()
    before = store.revision()
    assert store.update("tuned", {"a": {"us": 1.5}, "b": 2}) is None
    assert store.update("tuned", {"b": [3, None], "ü": "é"}) is None
    assert store.update("self_check", {"a": "ok"}) is None
    assert store.read("tuned") == {"a": {"us": 1.5}, "b": [3, None], "ü": "é"} and store.revision() > before
    assert store.clear("tuned") is None and store.clear("tuned") is None
    assert store.read("tuned") == {} and store.read("self_check") == {"a": "ok"}
    assert sorted(os.listdir(cache)) == ["self_check-1.json", "self_check-1.lock", "tuned-1.lock"]


def test_where_it_lies(monkeypatch, tmp_path):
    assert store.directory() == tmp_path / "cache"
    monkeypatch.delenv("FASTSEQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.directory() == tmp_path / "xdg" / "fastseq"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification says to ignore
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.directory() == tmp_path / ".cache" / "fastseq"
    monkeypatch.setenv("FASTSEQ_CACHE", "off")
    assert store.directory() is None


def test_a_kind_that_is_none():
    with pytest.raises(ValueError, match="tuned and self_check, got 'other'"):
        store.read("other")
    with pytest.raises(ValueError, match="Out of range"):
        store.update("tuned", {"a": float("nan")})
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.update("tuned", {"a": object()})


GOOD = store.document("tuned", {"a": 1})


def test_an_empty_store_is_one_and_not_set_aside(cache):
    assert store.update("tuned", {}) is None
    assert store.update("tuned", {"a": 1}) is None
    assert store.read("tuned") == {"a": 1} and not list(cache.glob("*.ignored"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (GOOD[:-9].encode(), "truncated or no JSON"),
        (b"", "truncated or no JSON"),
        (b"\xff\xfe\x00", "utf-8"),
        (b"[" * 100_000, "nested too deeply|no JSON"),
        (b"[]", "not fastseq's"),
        (b'{"entries": {}}', "not fastseq's"),
        (GOOD.replace('"version": 1', '"version": 2').encode(), 'its "version" is 2, not 1'),
        (GOOD.replace("tuned", "self_check").encode(), "its \"kind\" is 'self_check', not 'tuned'"),
        (b'{"schema": "fastseq-store", "version": 1, "kind": "tuned", "entries": []}', 'no "entries"'),
    ],
)
def test_a_file_that_is_no_store_is_ignored_with_one_warning_and_kept(cache, caplog, content, why):
    cache.mkdir()
    file = cache / "tuned-1.json"
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING, "fastseq"):
        assert store.read("tuned") == {} == store.read("tuned")
        assert len(caplog.records) == 1 and str(file) in caplog.text
        assert re.search(why, caplog.text)
        assert store.update("tuned", {"b": 2}) is None
    assert store.read("tuned") == {"b": 2} and len(caplog.records) == 1
    assert (cache / "tuned-1.json.ignored").read_bytes() == content


def test_what_a_newer_fastseq_keeps_is_left_alone(cache):
    cache.mkdir()
    newer = cache / "tuned-2.json"
    newer.write_text(GOOD.replace('"version": 1', '"version": 2'))
    store.update("tuned", {"b": 2})
    store.clear("tuned")
    assert newer.is_file() and store.read("tuned") == {}


def test_a_file_that_is_a_directory_or_a_pipe(cache, caplog):
    cache.mkdir()
    os.mkfifo(cache / "tuned-1.json")
    (cache / "self_check-1.json").mkdir()
    with caplog.at_level(logging.WARNING, "fastseq"):
        assert store.read("tuned") == store.read("self_check") == {}
    assert caplog.text.count("no regular file") == 2
    assert store.update("tuned", {"b": 2}) is None and store.update("self_check", {"b": 2}) is None
    assert store.read("tuned") == store.read("self_check") == {"b": 2}


@pytest.mark.parametrize("how", ["off", "a file", "under a file", "read-only"])
def test_what_cannot_be_written_holds_for_the_process(monkeypatch, tmp_path, how):
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir()
    chosen = {
        "off": "off",
        "a file": tmp_path / "file",
        "under a file": tmp_path / "file" / "cache",
        "read-only": tmp_path / "locked",
    }
    monkeypatch.setenv("FASTSEQ_CACHE", str(chosen[how]))
    if how == "read-only":  # for root as well, whom modes do not bind

        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(store, "open", refuse, raising=False)
    why = store.update("tuned", {"a": 1})
    assert why is not None and "cannot be written" in why and (how == "off" or str(chosen[how]) in why)
    assert store.read("tuned") == {"a": 1}
    assert python("from fastseq.choice import store; print(store.read('tuned'))").communicate()[0] == "{}\n"
    assert store.clear("tuned") is None and store.read("tuned") == {}


def test_what_was_unwritten_is_written_with_the_next(monkeypatch, tmp_path, cache):
    monkeypatch.setenv("FASTSEQ_CACHE", "off")
    assert store.update("tuned", {"a": 1})
    monkeypatch.setenv("FASTSEQ_CACHE", str(cache))
    assert store.update("tuned", {"b": 2}) is None
    assert store.parsed((cache / "tuned-1.json").read_text(), "tuned") == {"a": 1, "b": 2}


def test_processes_that_write_at_once_lose_nothing():
    code = (
        "import os; from fastseq.choice import store\n"
        "for i in range(40): assert not store.update('tuned', {f'{os.getpid()} {i}': i})"
    )
    processes = [python(code) for _ in range(3)]
    assert [p.communicate()[1] for p in processes] == [""] * 3
    assert len(store.read("tuned")) == 3 * 40


def test_a_writer_that_dies_leaves_the_old_file_and_no_lock(cache):
    assert store.update("tuned", {"a": 1}) is None
    code = "import os; from fastseq.choice import store\nos.replace = lambda *names: os._exit(9)\nstore.update('tuned', {'b': 2})"
    process = python(code)
    process.communicate()
    assert process.returncode == 9
    assert store.read("tuned") == {"a": 1} and store.update("tuned", {"c": 3}) is None
    assert store.read("tuned") == {"a": 1, "c": 3}


def test_a_lock_that_is_not_let_go_is_named(monkeypatch, cache):
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.05)
    store.update("tuned", {})
    code = (
        f"import fcntl, time; f = open({str(cache / 'tuned-1.lock')!r}, 'a'); fcntl.flock(f, fcntl.LOCK_EX)\n"
        "print(1, flush=True); time.sleep(60)"
    )
    holder = python(code)
    assert holder.stdout.readline() == "1\n"
    try:
        assert "another process has held" in (store.update("tuned", {"a": 1}) or "")
    finally:
        holder.kill()
        holder.communicate()
    assert store.update("tuned", {"b": 1}) is None and store.read("tuned") == {"a": 1, "b": 1}


def test_nobody_reads_it_on_import(cache):
    cache.mkdir()
    (cache / "tuned-1.json").write_text("{")  # reading it would warn
    code = (
        "import sys; seen = []\n"
        "sys.addaudithook(lambda name, args: seen.append(str(args[0])) if name == 'open' else None)\n"
        "import fastseq; print([name for name in seen if 'tuned' in name])"
    )
    out, err = python(code).communicate()
    assert out == "[]\n" and not err


def test_the_text_of_a_file_is_an_entry_a_line():
    text = store.document("tuned", {"b": 1, "a": {"x": [1]}})
    assert json.loads(text)["entries"] == {"a": {"x": [1]}, "b": 1} and len(text.splitlines()) == 4
    assert store.parsed(text, "tuned") == {"b": 1, "a": {"x": [1]}}
