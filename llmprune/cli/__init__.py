"""The command line: flags to a `Job`, results to text; the only package that prints.

May import everything; its modules import torch only inside functions, so that `--help` is fast.
A new flag of a run: a field of `Job`, nothing here. A new command: a parser in `flags`, a function in `main`, a line in
the table there, and its name in `guesses`.
"""
