"""`python -m megabus` is the command `megabus`."""

from megabus.cli import entry

if __name__ == "__main__":
    entry()
