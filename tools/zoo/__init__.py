"""The bug zoo: what the doctor is tested on.

nets.py       tiny Qwen3-MoE networks whose routers can be recorded and replayed, and their weight versions
scene.py      an engine that samples, a trainer that scores, and the evidence that they leave
failures.py   the known failures, each as small a change to engine, trainer or record as the real one
matrix.py     injected against diagnosed
"""
