"""Studies that are run from a checkout: perplexity, speed, zero-shot sets and comparisons with peer tools."""
