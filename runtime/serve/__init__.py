"""An artifact behind HTTP: requests of many clients meet in one queue and are answered in batches (docs/serve.md).

`batcher`, `classes` and `service` know nothing of HTTP; the other modules need the extra `serve`.
"""
