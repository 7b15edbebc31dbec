"""The two encoders, the two cross encoders, the heads.

Behind a value (P) says that the paper states it, (R) that its readers report it, (C) that it is the field's convention,
where neither is known.
"""
