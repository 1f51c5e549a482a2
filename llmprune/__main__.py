"""`python -m llmprune`."""

from llmprune.cli import entry

raise SystemExit(entry())
