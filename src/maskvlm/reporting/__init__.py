"""Output of a run: progress, tables, curves, pages."""
