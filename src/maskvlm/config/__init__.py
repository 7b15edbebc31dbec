"""From the user's words to values: YAML, options, their errors."""
