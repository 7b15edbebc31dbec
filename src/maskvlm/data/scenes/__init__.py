"""The built-in world of drawn scenes."""
