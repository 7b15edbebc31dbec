"""How it writes them."""
