"""Studies: sets of similar runs, and what they say about a claim."""
