"""What a run did, as data, as a page, as a model card.

May import `model` and below, never the stream. A new figure: a field of the report, a row in docs/reference/report.md.
"""
