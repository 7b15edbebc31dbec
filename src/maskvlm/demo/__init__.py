"""The demo page: `maskvlm demo`, or `make demo`. Mask words or patches and see them filled in from the other modality.

`serve` is the command, `page` and `tabs` are the page, `answers` renders results, `models` finds and loads models.
`request_limits` checks every request, with `request_origin`, `request_schema` and `upload_store`; `input_limits`,
`connection_timeouts` and `terminal` are the other limits.
"""
