"""What every package may use: errors, files, signals, processes."""
