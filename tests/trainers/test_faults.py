"""Misfortunes of `benchmarks.robustness`: each is found out where it does harm."""

import contextlib
import os
import sys
import time

import pytest

from benchmarks.robustness import children, faults
from benchmarks.robustness.victims import Victim, as_program

pytestmark = pytest.mark.slow  # processes that are started to be ended


def lines(folder):
    return (folder / "lines").read_text() if (folder / "lines").exists() else None


def is_struck_here(folder):
    """Wait for the strike, in work that one will come to."""
    mark, found = folder.parent / "struck here", folder.stat().st_ino
    if folder.name == "work" and not mark.exists():
        mark.touch()
        while folder.exists() and folder.stat().st_ino == found and not (folder.parent / "filler").exists():
            time.sleep(0.01)


def write_lines(folder, mode):
    for number in range(4):
        with (folder / "lines").open(mode) as file:
            file.write("line\n")
        if number == 1:
            is_struck_here(folder)


@as_program
def begins_anew(folder):
    (folder / "lines").unlink(missing_ok=True)
    write_lines(folder, "a")


@as_program
def forgets_that_it_began(folder):
    write_lines(folder, "a")


def says_all_it_knows(folder):
    write_lines(folder, "r+" if (folder / "lines").exists() else "w")


@as_program
def hangs_when_it_is_hurt(folder):
    try:
        begins_anew(folder)
    except SystemExit:
        time.sleep(100)


@as_program
def leaves_a_part(folder):
    part = folder / f".lines.{os.getpid()}.part"
    part.touch()
    begins_anew(folder)
    part.unlink()


@as_program
def goes_on_when_the_disk_is_full(folder):
    if lines(folder) is None:
        with (folder / "lines").open("wb", buffering=0) as file:
            is_struck_here(folder)
            for _ in range(60):
                with contextlib.suppress(OSError):
                    file.write(b"0" * 65536)


def struck(work, strike, **options):
    def strikes(folder, child, rng):
        child.until((folder.parent / "struck here").exists)
        return strike(folder, child, rng) if child.alive else None

    return faults.strikes({"lines": Victim(work, lines)}, strikes, 1, **options)


@pytest.mark.parametrize("strike", [faults.kill, faults.remove])
def test_work_that_begins_anew_loses_nothing(strike):
    outcome = struck(begins_anew, strike)
    assert (outcome.tried, outcome.lost) == (1, 0), outcome.about


@pytest.mark.parametrize(
    ("work", "strike", "said"),
    [
        (forgets_that_it_began, faults.kill, "went on otherwise"),
        (leaves_a_part, faults.kill, "left .lines."),
        (says_all_it_knows, faults.replace_by_a_file, "a traceback: NotADirectoryError"),
        (hangs_when_it_is_hurt, faults.remove, "it hung"),
    ],
)
def test_what_a_strike_does_harm_to_is_lost(monkeypatch, work, strike, said):
    monkeypatch.setattr(children, "PATIENCE", 10.0 if said != "it hung" else 2.0)
    outcome = struck(work, strike)
    assert outcome.lost >= 1
    assert said in outcome.about["lost"][0]


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.getuid() != 0, reason="mounting needs root")
def test_a_full_disk_that_goes_unnoticed_is_lost():
    outcome = struck(goes_on_when_the_disk_is_full, faults.fill, disk_mib=8)
    assert "went on otherwise" in outcome.about["lost"][0]


def swallows(folder, where, step):
    """Has a fault, and says nothing."""


def is_stopped(folder, where, step):
    sys.stderr.write(f"error: {where} is not finite at step {step}\n")
    raise SystemExit(1)


def damages(folder, where, step):
    (folder / "mark").touch()
    is_stopped(folder, where, step)


def marked(folder):
    return (folder / "mark").exists()


def nothing(folder):
    """Leaves nothing."""


@pytest.mark.parametrize(
    ("work", "said"), [(is_stopped, None), (swallows, "no error"), (damages, "went on otherwise than undisturbed")]
)
def test_a_fault_in_training_must_end_it_and_leave_no_trace(monkeypatch, work, said):
    monkeypatch.setitem(faults.VICTIMS, "training", Victim(nothing, marked))
    outcome = faults.inner_faults([(work, "data", "not finite")], 1)
    assert outcome.lost == (said is not None)
    assert said is None or said in outcome.about["lost"][0]


def asks_the_clock(folder):
    (folder / "lines").write_text(str(time.time() // 1e6))


def counts_processes(folder):
    import psutil

    (folder / "lines").write_text(str(len(psutil.Process().children())))


@pytest.mark.parametrize(
    ("disturb", "work"), [(faults.in_jumping_time, asks_the_clock), (faults.on_busy_cores, counts_processes)]
)
def test_work_that_depends_on_the_clock_or_on_others_is_lost(disturb, work):
    assert faults.undisturbed({"lines": Victim(work, lines)}, disturb, 1).lost == 1
    assert faults.undisturbed({"lines": Victim(nothing, lines)}, disturb, 1).lost == 0


def waits_for_ever(folder, rank, how):
    (folder / f"alive-{rank}").touch()
    time.sleep(100)


def says_that_the_other_has_died(folder, rank, how):
    (folder / f"alive-{rank}").touch()
    time.sleep(0.6)
    sys.stderr.write("error: another rank has died\n")
    raise SystemExit(1)


@pytest.mark.parametrize(("work", "said"), [(waits_for_ever, "it hung"), (says_that_the_other_has_died, None)])
def test_a_rank_that_hangs_when_the_other_is_killed_is_lost(work, said):
    what = faults.rank_killed(work, "", faults.random.Random(0), 1.5)
    assert (what is None) if said is None else (said in what)
