"""What is said of a user's mistakes: one in a line, several in a list, and of very many how many there are."""

from errors import SHOWN, list_problems


def test_one_problem_is_one_line():
    assert list_problems(["a.wav: is a folder"], remedy="; name a file") == "a.wav: is a folder; name a file"


def test_several_are_counted_and_listed_beneath():
    assert list_problems(["x", "y"], remedy="; see to them").splitlines() == ["2 problems; see to them", "  x", "  y"]
    assert list_problems(["x"], heading="1 of 6 clips").splitlines() == ["1 of 6 clips", "  x"]


def test_of_very_many_the_first_are_listed():
    lines = list_problems([f"clip {i}" for i in range(1000)], heading="1000 of 2000 clips").splitlines()
    assert lines[1:-1] == [f"  clip {i}" for i in range(SHOWN)] and lines[-1] == f"  ... and {1000 - SHOWN} more"
