"""The toy's world is complete or missing. The targets of the warm start earn the format reward."""

import pytest

from data import TEMPLATES
from reward import extract_answer, format_reward, prediction
from training import toy_model
from training.toy_world import write_world


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_make_world_is_complete_or_missing(tmp_path, monkeypatch):
    def killed(folder, **_):
        (folder / "audio").mkdir()
        (folder / "train.jsonl").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(toy_model, "write_world", killed)
        toy_model.make_world(tmp_path / "world")
    assert not (tmp_path / "world").exists()
    monkeypatch.setattr(toy_model, "write_world", lambda folder, **change: write_world(folder, 4, 4, **change))
    toy_model.make_world(tmp_path / "world", heldout_noise=2.0, label_noise=0.5)
    made = contents(tmp_path / "world")
    write_world(tmp_path / "direct", 4, 4, heldout_noise=2.0, label_noise=0.5)
    assert made == contents(tmp_path / "direct") and len(made) == 8 + 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["direct", "world"]
    toy_model.make_world(tmp_path / "world")  # found, not changed
    assert contents(tmp_path / "world") == made


@pytest.mark.parametrize("template", TEMPLATES)
def test_warm_start_text_earns_the_format_reward(template):
    text = toy_model.warm_start_text("stays the same", template)
    assert format_reward(text, template) == 1.0 and prediction(text) == "stays the same"
    assert text.count("stays the same") == (2 if template == "think" else 1)
    assert (extract_answer(text) is None) == (template == "direct")
