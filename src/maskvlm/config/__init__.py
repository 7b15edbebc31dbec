"""From command-line words to values: YAML, options and their errors."""
