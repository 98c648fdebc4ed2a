"""Where a curve of cost over size bends, and how long a point of it is measured."""

from argparse import Namespace

import pytest

import bench_scale
import bench_speed


def curve(sizes, **seconds):
    zeros = dict.fromkeys(bench_speed.PHASES, 0.0)
    return [{"size": size, "seconds": zeros | {name: f(size) for name, f in seconds.items()}} for size in sizes]


def test_where_a_curve_bends(tmp_path):
    """1 s that is fixed and 0.05 s a token: doubling 16 tokens costs 2.6 / 1.8, doubling 32 costs 4.2 / 2.6."""
    bends = curve((8, 16, 32, 64, 128), sample=lambda x: 1 + 0.01 * x, train=lambda x: 0.04 * x)
    assert bench_scale.bend(bends) == 2
    assert bench_scale.bend_sentence("max_new_tokens", bends) == (
        "completion length (tokens): bends at 32: from there on doubling costs 1.5 times and more "
        "(1.62 from 32 to 64); 80% of what is added there is the phase train."
    )
    flat = curve((1, 2, 4, 8), update=lambda x: 1 + 0.01 * x)
    assert bench_scale.bend(flat) is None and "no bend up to 8" in bench_scale.bend_sentence("group_size", flat)
    squares = curve((1, 5, 10, 30), sample=lambda x: x * x)
    assert bench_scale.bend(squares) == 0 and bench_scale.doublings(squares) == pytest.approx([4, 4, 4])

    bench_scale.draw({name: bends for name in bench_scale.SIZES}, "Some CPU", tmp_path / "docs" / "scale.png")
    assert (tmp_path / "docs" / "scale.png").stat().st_size < 100_000


def test_rounds_of_a_point(monkeypatch):
    """The first is a warm-up unless the time is up by then."""
    monkeypatch.setattr(bench_scale, "make_prompt", lambda *_: None)
    monkeypatch.setattr(bench_scale, "timed_step", lambda *_: dict.fromkeys(bench_speed.PHASES, next(times)))
    rank, args = Namespace(policy=None), Namespace(prompts_per_rank=1, clip_seconds=1, rounds=3)
    for limit, expected in ((100, {"rounds": 3, "seconds": 2}), (0, {"rounds": 1, "seconds": 9})):
        times = iter([9, 1, 2, 3, 4])
        found = bench_scale.time_point(rank, Namespace(**vars(args), seconds_per_point=limit))
        assert found == expected | {"seconds": dict.fromkeys(bench_speed.PHASES, expected["seconds"])}
