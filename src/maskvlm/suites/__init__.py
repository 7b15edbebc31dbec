"""Evaluation suites that are published elsewhere: a reader of the true files, the model's scores, and metrics. One file
a suite; `suite.py` says what a suite is, `run.py` runs one."""
