"""Studies: many runs that differ in little, and what they say of a claim."""
