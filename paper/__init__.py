"""The parts of reproduce.py: rows, commands, estimate and table of the paper's comparison."""
