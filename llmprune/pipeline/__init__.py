"""One run from a `Job` to a finished folder: checks, working directory, resume, allocation, report.

May import all packages but `cli`. A new stage of a block: a function in `steps`, a field of `Recipe`.
A new allocation rule: a function in `allocation` and a line in its table.
"""
