"""Image-text pairs: reading, preparing, sampling and batching them."""
