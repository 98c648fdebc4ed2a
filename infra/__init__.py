"""Ground floor, below questions, models and training: errors, files and their owners, clips, flags, pictures, ranks."""
