"""Training: the LightningModule, its optimiser and its state on disk."""
