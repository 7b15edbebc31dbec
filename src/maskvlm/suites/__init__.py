"""Published evaluation suites: a reader of the original files, the model's scores, and metrics. One file per suite;
`suite.py` defines what a suite is, `run.py` runs one."""
