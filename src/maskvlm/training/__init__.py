"""A run: the LightningModule, its optimiser, its state on disk."""
