"""How much do my engine and my trainer disagree on the same tokens, and why?

Reach for it before a long run, after an upgrade of SGLang, CUDA or Megatron, and when a run drifts and its own numbers do not
say why.  It needs a running SGLang server and the weights that it serves, no training run:

    python tools/engine_mismatch.py --engine http://127.0.0.1:30000 --checkpoint DIR --prompts FILE

The same as `megatron-vespo doctor probe`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script's own path is tools/

from megatron_vespo.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["doctor", "probe"]
    main()
