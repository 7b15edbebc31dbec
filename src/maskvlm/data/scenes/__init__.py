"""The built-in data set of drawn scenes."""
