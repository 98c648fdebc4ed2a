"""Parts of bench.py: memory and time of a training step, and time of an evaluation."""
