"""Ground floor, below questions, models and training: errors, files, clips, command lines, ranks."""
