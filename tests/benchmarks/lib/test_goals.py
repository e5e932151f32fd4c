"""Goals as data: files, machines, verdicts."""

from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.lib import goals
from benchmarks.lib.goals import Goal, Verdict
from benchmarks.lib.instruction_sets import InstructionSets
from bmc_core.machine.load import BUSY

FILES = sorted(Path(goals.__file__).parents[1].glob("*/goals.toml"))
AMX = InstructionSets("amx_bf16", "amx_bf16")
ZEN = InstructionSets("avx512_bf16", "avx512_bf16")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_every_file_can_be_read_and_names_its_sources(path: Path) -> None:
    found = goals.load(path)
    assert found
    assert all(len(goal.source) > 20 for goal in found)
    keys = [(g.system, g.case, g.metric, g.against, g.ours, g.theirs) for g in found]
    assert len(set(keys)) == len(keys)


def test_a_goal_holds_for_the_instruction_sets_of_both_sides() -> None:
    goal = Goal("x", "ratio", 2.4, against="y", ours=("avx512_bf16",), theirs=("avx512_bf16",))
    assert goals.holding([goal], ZEN) == [goal]
    assert goals.holding([goal], AMX) == []
    assert goals.holding([goal], InstructionSets("avx512_bf16", "amx_bf16")) == []
    sets = ("avx512", "avx2")
    pairs = Goal("x", "loss", 0.05, ours=sets, theirs=sets)
    held = [(a, b) for a in sets for b in sets if pairs.holds_for(InstructionSets(a, b))]
    assert held == [("avx512", "avx512"), ("avx2", "avx2")], "pairs, not every combination"
    assert goals.holding([Goal("x", "loss", 0.05)], AMX), "no sets: any machine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[set]]\ngoals = []", "source"),
        ('[[set]]\nsource = ""\ngoals = []', "source"),
        ('[[set]]\nsource = "s"\nisa = ["x"]\ngoals = []', "allowed: ours, theirs"),
        (
            '[[set]]\nsource = "s"\nours = ["a", "b"]\ntheirs = ["a"]\ngoals = []',
            "allowed: pairs",
        ),
        ('{metric = "speed", case = "x", at_least = 1}', "metric is 'speed'; allowed"),
        ('{metric = "ratio", case = "x"}', "allowed: at_least or at_most"),
        ('{metric = "ratio", case = "x", at_least = 1, at_most = 2}', "at_least or at_most"),
        ('{metric = "ratio", case = "x", at_least = 1, isa = "x"}', "isa"),
    ],
)
def test_a_file_with_mistakes_is_refused(tmp_path: Path, text: str, message: str) -> None:
    if text.startswith("{"):
        text = f'[metrics]\nratio = "{{sign}}"\n[[set]]\nsource = "s"\ngoals = [{text}]'
    (tmp_path / "goals.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        goals.load(tmp_path / "goals.toml")


def test_verdicts() -> None:
    least = Goal("x", "ratio", 2.0, against="CPU_ATTN")
    most = Goal("x", "cost", 0.5, at_most=True, against="y")
    assert Verdict("x", least, 2.0).met
    assert Verdict("x", least, 1.9).met is False
    assert Verdict("x", least, None).met is None
    assert Verdict("x", most, 0.5).met
    assert Verdict("x", most, 0.6).met is False
    assert Verdict("x", least, 1.5, at_floor=1.8).below_floor
    assert not Verdict("x", least, 1.5, at_floor=2.1).below_floor
    assert Verdict("x", most, 0.7, at_floor=0.6).below_floor
    assert not Verdict("x", most, 0.7).below_floor, "the floor says nothing of it"


def test_nothing_is_below_a_floor_that_is_not_told() -> None:
    """On a busy machine products are measured too slow, and floors come out too high."""
    beyond = Verdict("x", Goal("x", "gflops", 600.0, source="s"), 300.0, at_floor=400.0)
    assert goals.under_load([beyond], None) == [beyond]
    assert goals.under_load([beyond], BUSY) == [beyond]
    (doubtful,) = goals.under_load([beyond], BUSY + 0.01)
    assert not doubtful.below_floor
    small = beyond._replace(floor_told=False)
    assert goals.under_load([small], 0.0) == [small]
    console = Console(width=150, no_color=True)
    with console.capture() as shown:
        goals.show([doubtful], ZEN, console)
    assert "not met, the floor here is not told" in shown.get()
    (row,) = goals.document([doubtful])
    assert (row["below_floor"], row["floor_told"]) == (False, False)


def test_a_goal_beyond_the_machine_is_marked_and_sources_are_shown() -> None:
    goal = Goal("MQA", "read_share", 0.85, source="measured on another machine")
    console = Console(width=150, no_color=True)
    with console.capture() as shown:
        goals.show([Verdict("MQA", goal, 0.3, at_floor=0.42)], ZEN, console)
    text = " ".join(shown.get().split())
    assert "below the floor here: 0.42 at best" in text
    assert "(1) measured on another machine" in text
    assert "BMC avx512_bf16, peers avx512_bf16" in text
    with console.capture() as shown:
        goals.show([], AMX, console)
    assert "No goals are stated for BMC amx_bf16, peers amx_bf16" in shown.get()
    (row,) = goals.document([Verdict("MQA", goal, 0.3, at_floor=0.42)])
    assert row["below_floor"] is True
    assert row["met"] is False
    assert row["source"] == "measured on another machine"
