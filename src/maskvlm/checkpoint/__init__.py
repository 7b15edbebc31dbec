"""Model files: read as plain data, completely or not at all."""
