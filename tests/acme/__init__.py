"""A package of somebody else's: a loss, a way of masking images and one of masking texts."""
