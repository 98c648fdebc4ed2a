"""How many rounds a point of bench.py scale is measured, and the picture."""

from argparse import Namespace

from benchmarks import scale, speed


def test_picture(tmp_path):
    curve = [{"size": size, "seconds": dict.fromkeys(speed.PHASES, 0.01 * size)} for size in (8, 16, 32)]
    scale.draw({name: curve for name in scale.SIZES}, "Some CPU", tmp_path / "docs" / "scale.png")
    assert (tmp_path / "docs" / "scale.png").stat().st_size < 100_000


def test_rounds_of_a_point(monkeypatch):
    """The first round only warms up, unless the time is over after it."""
    monkeypatch.setattr(scale, "make_prompt", lambda *_: None)
    monkeypatch.setattr(scale, "timed_step", lambda *_, **how: dict.fromkeys(speed.PHASES, next(times)))
    sizes = dict(group_size=2, clip_seconds=1, max_new_tokens=1, prompts_per_rank=1)
    for limit, expected in ((100, {"rounds": 3, "seconds": 2}), (0, {"rounds": 1, "seconds": 9})):
        times = iter([9, 1, 2, 3, 4])
        found = scale.time_point(Namespace(policy=None), **sizes, rounds=3, max_seconds=limit)
        assert found == expected | {"seconds": dict.fromkeys(speed.PHASES, expected["seconds"])}
