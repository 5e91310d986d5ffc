"""`megabus evaluate-nli`, for launchers that start a file: `deepspeed tools/evaluate_nli.py`."""

import sys

try:
    from megabus.cli import entry
except ModuleNotFoundError as error:
    if error.name != "megabus":
        raise
    print("error: megabus is not installed: pip install -e .", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    entry("evaluate-nli")
