"""Training objectives and metrics: tasks, masking, losses.

Marks after a default value: (P) stated in the paper, (R) reported by its readers, (C) the field's convention, where
neither is known.
"""
