"""`python -m llmprune`."""

from llmprune.cli import main

raise SystemExit(main())
