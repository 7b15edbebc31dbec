"""The page: `maskvlm demo`, or `make demo`. Mask words or patches and watch the one filled in from the other.

`serve` is the command, `page` and `tabs` the page, `answers` what it shows, `models` what it asks; `guard` is its door,
which asks `origin`, `calls` and `shelf`; `intake`, `wire` and `terminal` are its other limits.
"""
