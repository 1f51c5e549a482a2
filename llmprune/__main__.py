"""`python -m llmprune`."""

from llmprune.cli.main import entry

raise SystemExit(entry())
