"""Sets that `maskvlm data` wrote."""
