"""The run around grpo_aqa.py and sft_aqa.py: settings, checks, optimizer, saves, metrics, and the toy."""
