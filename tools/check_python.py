"""Say at once, and in words, that this interpreter is too old or too new; `make setup` runs it first."""

import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 12):
    found = ".".join(map(str, sys.version_info[:3]))
    sys.exit(f"Python = {found}: expected 3.11 or 3.12; run e.g. `make PYTHON=python3.11 ...`")
