"""Files of measured costs, which are never trusted blindly."""

import copy
import functools
import itertools
import json
import math
import operator
import os
import pwd
import socket
import time
from pathlib import Path

import pytest

from bmc_core.costs import cache, calibration
from bmc_core.costs.calibration import auto_policy, calibrate, key_of
from bmc_core.costs.geometry import Geometry
from bmc_core.costs.model import Workload
from tests.support.alarms import within
from tests.support.figures import FIGURES, TINY


def broken(change) -> str:
    """A good document, changed."""
    document = {
        "schema": cache.SCHEMA,
        "created": time.time(),
        "key": key_of(TINY, 1),
        "measured": FIGURES._asdict(),
    }
    document = json.loads(json.dumps(document))
    change(document)
    return json.dumps(document)


BROKEN = {
    "empty": "",
    "cut": '{"schema": 1, "created": 17',
    "not an object": "[1, 2]",
    "deep": "[" * 100_000,
    "another schema": lambda d: d.update(schema=99),
    "no key": lambda d: d.pop("key"),
    "another machine": lambda d: d["key"].update(processor="another"),
    "old": lambda d: d.update(created=time.time() - 365 * 86400),
    "from the future": lambda d: d.update(created=time.time() + 9999),
    "no date": lambda d: d.update(created=None),
    "no figures": lambda d: d.update(measured=None),
    "a field is missing": lambda d: d["measured"].pop("sdpa"),
    "a field too many": lambda d: d["measured"].update(more=1),
    "NaN": lambda d: d["measured"]["sdpa"][0].__setitem__(1, math.nan),
    "infinite": lambda d: d["measured"]["padded"][1].__setitem__(2, math.inf),
    "negative": lambda d: d["measured"]["growth_rows"][0].__setitem__(1, -1.0),
    "zero seconds": lambda d: d["measured"]["growth_rows"][0].__setitem__(1, 0.0),
    "a row that costs nothing": lambda d: d["measured"]["native"][1].__setitem__(1, 0.0),
    "a string": lambda d: d["measured"]["steps"][0].__setitem__(1, "fast"),
    "true": lambda d: d["measured"]["steps"][0].__setitem__(1, True),
    "falling": lambda d: d["measured"]["growth_rows"].reverse(),
    "no points": lambda d: d["measured"].update(growth_rows=[]),
    "no point": lambda d: d["measured"].update(steps=[[1]]),
    "half of the native figures": lambda d: d["measured"].update(native=None),
    "no integer of a float": lambda d: d["measured"]["steps"][0].__setitem__(1, 10**400),
    "rows of 400 digits": lambda d: d["measured"]["steps"][1].__setitem__(0, 10**400),
    "a date of 400 digits": lambda d: d.update(created=10**400),
    "a negative date of 400 digits": lambda d: d.update(created=-(10**400)),
    "5000 digits": '{"schema": ' + "9" * 5000 + "}",
    "a century for a byte": lambda d: d["measured"]["sdpa"][0].__setitem__(1, 1e300),
    "next to no time": lambda d: d["measured"]["native"][0].__setitem__(1, 1e-300),
    "growth of no bytes": lambda d: d["measured"].update(growth_rows=[[0, 1e-4]]),
    "two points at one row": lambda d: d["measured"].update(steps=[[1.2, 1e-3], [1.7, 2e-3]]),
    "half a row": lambda d: d["measured"]["steps"][0].__setitem__(0, 0.5),
    "a megabyte": " " * (cache.MAX_FILE_BYTES + 1),
    "not text": b"\xff\xfe\x00",
    "another number of costs": lambda d: d["measured"].update(native=[1.0]),
    "another number of figures": lambda d: d["measured"]["native"][0].pop(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_or_stale_file_is_measured_again(measured: list[Geometry], name: str) -> None:
    change = BROKEN[name]
    path = cache.path_of(key_of(TINY, 1))
    path.parent.mkdir(parents=True)
    text = broken(change) if callable(change) else change
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found, reason = cache.load(key_of(TINY, 1))
    assert found is None
    assert str(path) in reason
    assert calibrate(TINY, threads=1).fresh
    assert measured == [TINY]
    assert cache.load(key_of(TINY, 1))[0] == FIGURES, "the good file took its place"
    assert os.listdir(path.parent) == [path.name], "no temporary file is left"


def test_a_good_file_is_good(measured: list[Geometry]) -> None:
    """What `broken` changes is good before it."""
    path = cache.path_of(key_of(TINY, 1))
    path.parent.mkdir(parents=True)
    path.write_text(broken(lambda document: None))
    assert not calibrate(TINY, threads=1).fresh
    assert measured == []


def test_an_unreadable_file_is_measured_again(measured: list[Geometry]) -> None:
    path = cache.path_of(key_of(TINY, 1))
    path.mkdir(parents=True)
    found = calibrate(TINY, threads=1)
    assert found.fresh
    assert found.path is None, "a folder is in the way: nothing was kept"


def fifo(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    "put",
    [
        fifo,
        listening,
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path),
        lambda path: path.mkdir(mode=0),
    ],
    ids=["FIFO", "socket", "endless device", "link to itself", "closed folder"],
)
def test_what_is_no_file_is_measured_again_at_once(
    measured: list[Geometry], put, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cache.path_of(key_of(TINY, 1))
    path.parent.mkdir(parents=True)
    monkeypatch.chdir(path.parent)  # a socket's address is short
    put(Path(path.name))
    with within(20):
        assert calibrate(TINY, threads=1).fresh
    assert measured == [TINY]
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("seconds", [-2, -1800, 1800])
def test_a_clock_that_is_a_little_wrong_discards_nothing(seconds: float) -> None:
    path = cache.path_of(key_of(TINY, 1))
    path.parent.mkdir(parents=True)
    path.write_text(broken(lambda document: document.update(created=time.time() - seconds)))
    assert cache.load(key_of(TINY, 1))[0] == FIGURES


EXTREMES = (0, 1, 1.5, 1e-6, cache.LEAST, cache.MOST, 5e-324, 1e-300, 1e300, 10**400, 2**63, -0.0)


def places(node, where=("measured",)) -> list[tuple]:
    """Where the numbers are in a document."""
    if isinstance(node, (int, float)):
        return [where]
    keys = node if isinstance(node, dict) else range(len(node))
    return [place for key in keys for place in places(node[key], (*where, key))]


def test_figures_that_load_give_a_policy() -> None:
    """Every figure in turn, and all of a kind together, at the ends of what is accepted."""
    path = cache.path_of(key_of(TINY, 1))
    path.parent.mkdir(parents=True)
    document = json.loads(broken(lambda document: None))
    single = places(document["measured"])
    kinds = {(place[1], place[-1]) for place in single}
    together = [[place for place in single if (place[1], place[-1]) == kind] for kind in kinds]
    accepted = 0
    for group in [[place] for place in single] + together:
        for value in EXTREMES:
            changed = copy.deepcopy(document)
            for *folders, last in group:
                functools.reduce(operator.getitem, folders, changed)[last] = value
            path.write_text(json.dumps(changed))
            figures, _ = cache.load(key_of(TINY, 1))
            if figures is not None:
                accepted += 1
                assert_policies(calibration.Calibration(TINY, 1, figures, path, False))
    assert accepted > len(single)


def assert_policies(found: calibration.Calibration) -> None:
    for attention, known in itertools.product(calibration.ATTENTIONS, (False, True)):
        costs = found.costs(attention, 2, 600)
        policy = calibration.choose_policy(costs, Workload(100, 500, 2), known)
        rows = policy.rows_to_hold(0, 100, 600 if known else None)
        assert 100 <= rows < 1 << 20, (found.measured, attention, known, policy)


def test_a_user_without_a_home_keeps_nothing(
    measured: list[Geometry], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a container that runs as some number: no HOME, no entry in the passwd file."""

    def nobody(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME")
    found = calibrate(TINY, threads=1)
    assert (found.path, found.fresh) == (None, True)
    assert not calibrate(TINY, threads=1).fresh, "known in this process"
    kept = [record.message for record in caplog.records if "are not kept" in record.message]
    assert len(kept) == 1
    assert "allowed: an absolute path in XDG_CACHE_HOME or HOME" in kept[0]
    assert auto_policy(
        TINY, batch_size=1, prompt_rows=8, total_rows=64, attention="sdpa"
    ).rows_to_hold(0, 8, 64)


def test_an_unwritable_folder_is_said_once(
    measured: list[Geometry],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = calibrate(TINY, threads=1)
    assert found.fresh
    assert found.path is None
    assert not calibrate(TINY, threads=1).fresh, "known in this process"
    assert sum("are not kept" in record.message for record in caplog.records) == 1


def test_a_failed_write_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_of(TINY, 1)
    path = cache.save(key, FIGURES)
    with pytest.raises(ValueError, match="JSON"):
        cache.save(key, FIGURES._replace(growth_rows=((1.0, math.nan),)))
    assert cache.load(key)[0] == FIGURES
    assert os.listdir(path.parent) == [path.name]
