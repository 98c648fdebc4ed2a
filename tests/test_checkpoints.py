"""Model folders: a checkpoint loads back equal, a damaged one is refused in one line, a save is complete or absent."""

import json
import os
import re
import shlex
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from safetensors.torch import load, save
from torch.testing import assert_close
from training_runs import killed_in, names
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration
from transformers.utils import hub

import policy
from infra.errors import InputError
from infra.processes import SharedInputError
from model import checkpoints
from model.checkpoints import (
    REMEMBERED,
    check_model,
    identify_model,
    load_on_all_ranks,
    load_policy,
    load_processor,
    remembered_template,
    save_checkpoint,
)
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
    "damaged processor": changed("processor_config.json", lambda old: b"{"),
    "another tokenizer": changed("config.json", lambda old: re.sub(rb'(audio_token_index": )', rb"\g<1>1", old)),
    "other mel bins": changed(
        "processor_config.json", lambda old: old.replace(b'"feature_size": 40', b'"feature_size": 80')
    ),
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


RESPONSE = SimpleNamespace(headers={}, request=None)
DOWNLOADS = {
    "the cache is empty": (None, "couldn't connect.*unset HF_HUB_OFFLINE; or run `hf download`"),
    "no access": (GatedRepoError("401 Client Error.\n\nNo access", response=RESPONSE), "on the model's page"),
    "no such name": (RepositoryNotFoundError("401 Client Error.", response=RESPONSE), "check the name, or run"),
    "an old token": (HfHubHTTPError("401 Client Error: Unauthorized", response=RESPONSE), "with a valid token"),
    "a full disk": (OSError(28, "No space left on device"), "larger disk with HF_HOME"),
    "a full disk, from Xet": (RuntimeError("I/O: No space left on device (os error 28)"), "larger disk with HF_HOME"),
}


@pytest.mark.parametrize("fault", DOWNLOADS)
def test_a_failed_download_ends_in_one_line_with_a_remedy(tmp_path, monkeypatch, fault):
    """Without a connection, transformers itself looks into an empty cache. The other errors are raised in its place."""
    error, remedy = DOWNLOADS[fault]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if error:
        monkeypatch.setattr(hub, "hf_hub_download", Mock(side_effect=error))
    with pytest.raises(InputError, match=rf"\Asome/model: cannot be loaded as .{{1,500}}{remedy}.*\Z"):
        check_model("some/model")


@pytest.mark.parametrize("lost", ["processor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_folder_without_a_whole_processor_is_refused_and_the_printed_command_repairs_it(saved, tmp_path, lost):
    """transformers would load a tokenizer of six tokens, or another end token."""
    folder = shutil.copytree(saved, tmp_path / "it's a model")
    (folder / lost).unlink()
    with pytest.raises(InputError, match=f"has no {lost}; copy the processor of .*: python -c ") as error:
        check_model(str(folder))
    [code] = shlex.split(str(error.value).partition("python -c ")[2])
    exec(code.replace("Qwen/Qwen2-Audio-7B-Instruct", str(saved)))
    check_model(str(folder))
    assert load_processor(str(folder)).tokenizer.get_vocab() == load_processor(str(saved)).tokenizer.get_vocab()


def as_on_the_hub(saved, folder):
    """Copy a model in the layout of Qwen2-Audio on the Hub: preprocessor_config.json, and no chat template."""
    shutil.copytree(saved, folder)
    (folder / "chat_template.jinja").unlink()
    extractor = json.loads((folder / "processor_config.json").read_text())["feature_extractor"]
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(extractor))


def test_the_layout_of_the_hub_is_whole(saved, tmp_path):
    as_on_the_hub(saved, tmp_path / "hub")
    check_model(str(tmp_path / "hub"))
    assert load_processor(str(tmp_path / "hub")).chat_template == load_processor(str(saved)).chat_template


def test_nodes_that_have_different_models_are_told(saved, tmp_path, monkeypatch):
    """Each rank tells the others some weights. Here, one process plays both ranks."""
    folder, told = shutil.copytree(saved, tmp_path / "model"), []
    monkeypatch.setattr(checkpoints, "gather", lambda value: told.append(value) or [value])
    load_on_all_ranks(str(folder), torch.float32, CPU)
    monkeypatch.setattr(checkpoints, "gather", lambda value: [value, told.pop(0)])
    weights = load((folder / "model.safetensors").read_bytes())
    [name] = [name for name in weights if name.endswith("embed_tokens.weight")]  # older transformers name it otherwise
    weights[name][0, 5] += 0.1
    (folder / "model.safetensors").write_bytes(save(weights, PYTORCH))
    with pytest.raises(SharedInputError, match="model: is not the same model on all nodes"):
        load_on_all_ranks(str(folder), torch.float32, CPU)


# ---- identify ----


def test_a_copy_is_the_same_model_and_a_changed_file_is_named(saved, tmp_path, monkeypatch):
    """Each file is told by its content, not by its time. Predictions beside the model do not count."""
    folder = shutil.copytree(saved, tmp_path / "model")
    os.utime(folder / "model.safetensors", (1, 1))
    (folder / "mmau_predictions.json.settings.json").write_text("{}")
    before = identify_model(str(saved))
    monkeypatch.chdir(folder)
    assert identify_model(".") == identify_model(str(folder)) == before
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} < set(before)
    changed("model.safetensors", lambda old: old[:-1] + bytes([old[-1] ^ 1]))(folder)  # of the same size
    after = identify_model(str(folder))
    assert [name for name in before if before[name] != after[name]] == ["model.safetensors"]
    assert re.fullmatch(r"\d+ bytes, SHA-256 [0-9a-f]{16}", after["model.safetensors"])
    assert (
        identify_model(str(shutil.copytree(saved, tmp_path / "snapshots" / "mine"))) == before
    )  # no commit of the Hub


def test_an_adapter_is_the_same_after_its_base_has_moved(tmp_path):
    """But not with another base, or with other settings."""
    seen = []
    for base, alpha in (("base", 1), ("moved", 1), ("moved", 2), ("other", 2)):
        (tmp_path / base).mkdir(exist_ok=True)
        (tmp_path / base / "model.safetensors").write_bytes(b"x" * (3 if base == "other" else 2))
        settings = {"peft_type": "LORA", "lora_alpha": alpha, "base_model_name_or_path": str(tmp_path / base)}
        (tmp_path / "adapter_model.safetensors").touch()
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        seen.append(identify_model(str(tmp_path)))
    assert seen[0] == seen[1] and "base/model.safetensors" in seen[0]
    for i, name in ((1, "adapter_config.json"), (2, "base/model.safetensors")):
        assert [key for key in seen[i] if seen[i][key] != seen[i + 1][key]] == [name]


def test_a_model_of_the_hub_is_its_commit(saved, tmp_path, monkeypatch):
    """By name, and as the folder that `hf download` prints."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit, home = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--some--model"
    as_on_the_hub(saved, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    assert identify_model("some/model") == identify_model(str(home / "snapshots" / commit)) == {"commit": commit}


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
