"""The report of a run as data, as a page and as a model card; its facts in words.

May import `sources`, `structure` and below, never the stream. A new figure: a field of the report, a row in
docs/reference/report.md.
"""
