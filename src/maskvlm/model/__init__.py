"""The two encoders, the two cross encoders, the heads."""
