"""Files that hold a model: read as data, whole or not at all."""
