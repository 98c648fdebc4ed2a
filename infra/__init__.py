"""Ground floor: errors, files, clips, command lines and ranks. Knows nothing of questions, models or training."""
