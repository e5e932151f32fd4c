"""The kernel benchmark's cases: names, bytes, operations, selections."""

from dataclasses import replace

import pytest

from benchmarks.kernel import cases


def test_names_are_unique_and_lists_nest() -> None:
    quick, full = (cases.select(name, 8) for name in ("quick", "full"))
    assert len({case.name for case in full}) == len(full)
    assert {case.name for case in quick} < {case.name for case in full}
    assert cases.select("full", 1)
    assert all(len({c.group for c in batch}) == 1 for batch in cases.batches(full))


def test_bytes_and_operations() -> None:
    case = cases.PREFILL
    assert case.kv_bytes == 2048 * 8 * 128 * 2 * 2
    assert case.flops == 4 * 32 * 128 * (2048 * 2049 // 2)
    assert cases.GQA.flops == 4 * 32 * 128 * 8 * 2048
    assert replace(cases.GQA, kind="write").kv_bytes == 8 * 8 * 128 * 2 * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("slow", 2), "--cases is 'slow'; allowed: quick, full"),
        (("quick", 2, "no such case"), "--only is 'no such case'; allowed: part of one of"),
        (("quick", 2, "("), "--only is '\\(', no regular expression"),
        (("quick", 2, None, "int8"), "--dtype is 'int8'; allowed: bfloat16, float16, float32"),
    ],
)
def test_bad_selections(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        cases.select(*arguments)


def test_selection() -> None:
    only = cases.select("quick", 2, "^width")
    assert len(only) == 5, "not in quick: the full list is searched"
    halves = cases.select("quick", 2, None, "float16")
    assert {case.dtype for case in halves} == {"float16"}
    assert any(case.name.endswith("d128 float16") for case in halves), "the quick list's own"
    assert "prefill 1x2048 q2048 h32/8 d128 float16" in {case.name for case in halves}
    assert len({case.inputs_key for case in halves if case.kind == "decode"}) == len(
        [case for case in halves if case.kind == "decode"]
    )
