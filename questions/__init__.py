"""Question files: JSON, JSON lines and CSV, with the field names of any data set."""
