"""Under policy.py: checkpoints, Qwen2-Audio's inside, decoding and LoRA. A reader of GRPO may skip it."""
