"""A simulated SGLang server: the HTTP surface of the real one and its timing, without a model.

    python -m megatron_vespo.rollout.simulated_engine --port PORT --model DIR [--engines N] [option]...

It speaks what the client, the fleet and the weight push use of SGLang 0.5.23 (engine.py), computes nothing, and says
what its arguments determine (content.py): every token, log-prob and expert can be worked out by a test.  Its time is
virtual (scheduler.py), its weights are real bytes of which digests are kept (weights.py), and it fails as told
(faults.py).  `SimulatedServer` starts it as a process.
"""

from megatron_vespo.rollout.simulated_engine.behaviour import Behaviour
from megatron_vespo.rollout.simulated_engine.content import simulated_logp
from megatron_vespo.rollout.simulated_engine.server import SimulatedServer, SimulatedServers

__all__ = ["Behaviour", "SimulatedServer", "SimulatedServers", "simulated_logp"]
