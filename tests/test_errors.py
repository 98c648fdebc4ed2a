"""Problems in a message: one is a line, several are a list, and a long list is cut."""

from infra.errors import SHOWN, list_problems


def test_one_problem_is_one_line():
    assert list_problems(["a.wav: is a folder"], remedy="; name a file") == "a.wav: is a folder; name a file"


def test_several_problems_are_counted_and_listed():
    assert list_problems(["x", "y"], remedy="; see to them").splitlines() == ["2 problems; see to them", "  x", "  y"]
    assert list_problems(["x"], heading="1 of 6 clips").splitlines() == ["1 of 6 clips", "  x"]


def test_a_long_list_is_cut():
    lines = list_problems([f"clip {i}" for i in range(1000)], heading="1000 of 2000 clips").splitlines()
    assert lines[1:-1] == [f"  clip {i}" for i in range(SHOWN)] and lines[-1] == f"  ... and {1000 - SHOWN} more"
