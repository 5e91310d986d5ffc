"""One-line faults that the tests must notice; `python -m tests.mutations` plants them one by one."""
