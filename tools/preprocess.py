"""`megabus preprocess`, by the path that clusters call."""

import sys

try:
    from megabus.cli import entry
except ModuleNotFoundError as error:
    if error.name != "megabus":
        raise
    print("error: megabus is not installed: pip install -e .", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    entry("preprocess")
