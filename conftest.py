"""What every test run has: the clause matrix (``--clauses``)."""

pytest_plugins = ["tests.clauses.matrix"]
