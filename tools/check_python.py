"""Say at once, and in words, what this interpreter lacks; `make setup` runs it first."""

import importlib.util
import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 12):
    found = ".".join(map(str, sys.version_info[:3]))
    sys.exit(f"Python = {found}: expected 3.11 or 3.12; run e.g. `make PYTHON=python3.11 ...`")
if importlib.util.find_spec("ensurepip") is None:
    sys.exit(
        "ensurepip = missing: needed to make a virtual environment; install your system's python3-venv package"
    )
