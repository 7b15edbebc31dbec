"""The page: `maskvlm demo`, or `make demo`. Mask words or patches and watch the one filled in from the other.

`serve` is the command, `page` and `tabs` the page, `answers` what it shows, `models` what it asks; `request_limits` is
its door, which asks `request_origin`, `request_schema` and `upload_store`; `input_limits`, `connection_timeouts` and
`terminal` are its other limits.
"""
