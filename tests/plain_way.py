"""The plain way: transformers' own forward, with every prompt repeated and every clip padded to its full length."""

import torch

from infra.audio import SAMPLE_RATE, load_audio
from policy import encode_prompts


def full_prompt(processor, questions):
    """Encode prompts with mel frames of full length, as transformers' own forward takes them."""
    settings = dict(sampling_rate=SAMPLE_RATE, return_attention_mask=True, return_tensors="pt")
    mel = processor.feature_extractor([load_audio(q.audio) for q in questions], **settings)
    prompt = encode_prompts(processor, questions, "answer")
    return prompt | {"input_features": mel["input_features"], "feature_attention_mask": mel["attention_mask"]}


def merged_embeds(model, prompt):
    """Return the embeddings that transformers' own forward gives its language model, [B, P, H]."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model.model(**prompt)
    hook.remove()
    return seen[0]


def plain_logits(model, prompt, completions, mask):
    """Compute the logits of completion tokens, [N, T, vocabulary], in one forward over prompts and completions."""
    owner = torch.arange(len(completions)) // (len(completions) // len(prompt["input_ids"]))
    inputs = {name: tensor[owner] for name, tensor in prompt.items()}
    attention_mask = torch.cat([inputs["attention_mask"], mask.long()], dim=1)
    if (completions == model.config.audio_token_id).any():  # the forward would put audio in its place
        words = model.get_input_embeddings()(completions)
        inputs = {"inputs_embeds": torch.cat([merged_embeds(model, inputs), words], dim=1)}
    else:
        inputs["input_ids"] = torch.cat([inputs["input_ids"], completions], dim=1)
    inputs |= {"attention_mask": attention_mask, "position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0)}
    return model(**inputs, use_cache=False).logits[:, -completions.shape[1] - 1 : -1]
