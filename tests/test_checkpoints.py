"""Model folders: a checkpoint loads back equal, a damaged one is refused in one line, a save is complete or absent."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load, save
from torch.testing import assert_close
from training_runs import killed_in, names
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

import policy
from infra.errors import InputError
from model.checkpoints import REMEMBERED, check_model, load_policy, remembered_template, save_checkpoint
from training import toy_model

CPU = torch.device("cpu")
PYTORCH = {"format": "pt"}  # transformers requires this metadata in a safetensors file


def test_policy_has_load_policy_too():
    assert policy.load_policy is load_policy


# ---- load ----


@pytest.fixture(scope="module")
def saved(tiny, questions, tmp_path_factory):
    """The folder of a checkpoint of the tiny model, with a tokenizer that pads on the right."""
    folder = tmp_path_factory.mktemp("saved") / "step_000001"
    _, processor = toy_model.make_model(questions, 2, seed=0)
    processor.tokenizer.padding_side = "right"
    save_checkpoint(folder, tiny[0], processor)
    return folder


def test_a_checkpoint_loads_back_equal(tiny, saved):
    """load_policy returns the model in eval mode, with padding on the left. transformers alone loads it as well."""
    model, processor = load_policy(str(saved), torch.float64, CPU)
    assert not model.training and processor.tokenizer.padding_side == "left"
    for loaded in (model, Qwen2AudioForConditionalGeneration.from_pretrained(saved, dtype=torch.float64)):
        assert_close(loaded.state_dict(), tiny[0].state_dict(), rtol=0, atol=0)
    for loaded in (processor, AutoProcessor.from_pretrained(saved)):
        text = "<|im_start|>user\n<|AUDIO|> rain<|im_end|>"
        assert loaded.tokenizer(text)["input_ids"] == tiny[1].tokenizer(text)["input_ids"]
        assert loaded.chat_template == tiny[1].chat_template
    assert load_policy(str(saved), torch.bfloat16, CPU)[0].dtype == torch.bfloat16


def changed(name, change):
    """Return a function that changes the bytes of a file in a folder."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


BAD_CONFIGS = {
    "no folder": shutil.rmtree,
    "no config": lambda folder: (folder / "config.json").unlink(),
    "another model": changed("config.json", lambda old: b'{"model_type": "qwen2"}'),
    "unknown model": changed("config.json", lambda old: b'{"model_type": "none_of_these"}'),
    "not a model": changed("config.json", lambda old: b"{}"),
    "corrupt config": changed("config.json", lambda old: old[:100]),
}
BAD_FILES = {
    "no processor": lambda folder: (folder / "processor_config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "truncated weights": changed("model.safetensors", lambda old: old[:100_000]),
    "empty weights": changed("model.safetensors", lambda old: b""),
    "half the weights": changed("model.safetensors", lambda old: save(dict([*load(old).items()][::2]), PYTORCH)),
    "cut tensors": changed("model.safetensors", lambda old: save({n: w[:1] for n, w in load(old).items()}, PYTORCH)),
}


@pytest.mark.parametrize("damage", BAD_CONFIGS | BAD_FILES)
def test_a_damaged_folder_is_an_input_error(saved, tmp_path, damage):
    """The error is one line that names the folder. check_model finds a bad config without loading weights."""
    folder = str(shutil.copytree(saved, tmp_path / "model"))
    check_model(folder)
    (BAD_CONFIGS | BAD_FILES)[damage](tmp_path / "model")
    one_line = rf"\A{re.escape(folder)}: .{{1,400}}\Z"
    if damage in BAD_CONFIGS:
        with pytest.raises(InputError, match=one_line):
            check_model(folder)
    with pytest.raises(InputError, match=one_line):
        load_policy(folder, torch.float32, CPU)


# ---- save ----


def test_a_checkpoint_is_replaced_as_a_whole_or_not_at_all(tmp_path, tiny):
    model, processor = tiny
    folder = tmp_path / "step_000002"
    folder.mkdir()
    (folder / "of_the_earlier_one").write_text("")
    with killed_in(processor, "save_pretrained"):
        save_checkpoint(folder, model, processor)
    assert [path.name for path in folder.iterdir()] == ["of_the_earlier_one"]
    save_checkpoint(folder, model, processor)  # on top of the remains
    assert names(tmp_path) == ["step_000002"] and list(tmp_path.glob("*.unfinished")) == []
    assert (folder / "model.safetensors").exists() and not (folder / "of_the_earlier_one").exists()


def test_a_checkpoint_remembers_its_template(tiny, tmp_path):
    for folder, template in (("told", "think"), ("untold", None)):
        save_checkpoint(tmp_path / folder, *tiny, template)
        assert remembered_template(tmp_path / folder) == template
    assert remembered_template("Qwen/Qwen2-Audio-7B-Instruct") is None
    for text in ("{", "[]", "{}", '{"template": "none of these"}'):
        (tmp_path / REMEMBERED).write_text(text)
        with pytest.raises(InputError, match=f"{REMEMBERED}: cannot be used .*--template"):
            remembered_template(tmp_path)
