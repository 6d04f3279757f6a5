"""Do the expert choices that my engine recorded belong to these tokens and layers, and how far do the routers disagree?

Reach for it before replay (R3) is switched on, and whenever replay makes matters worse: rows that are shifted, belong to
another layer or sequence, or were never written look like noise in every average.  It needs a rollout or evidence file:

    python tools/router_divergence.py FILE

The same as `megatron-vespo doctor check-routes`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own path is tools/

from megatron_vespo.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["doctor", "check-routes"]
    main()
