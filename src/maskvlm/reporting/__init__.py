"""What a run shows: progress, tables, curves, pages."""
