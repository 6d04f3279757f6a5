"""What a user brings: an environment and a reward function, named by file in test_runs.py."""

from __future__ import annotations

from megatron_vespo.data.environments import between_turns


class Insists:
    """Asks once more after every turn, until `environment.max_turns`."""

    def __init__(self, tokenizer):
        self._question = between_turns(tokenizer, [{"role": "user", "content": "Sure?"}])

    async def reply(self, prompt, response):
        return self._question


async def parity(prompt, response, answer):
    """Half of all responses are right, whatever the model."""
    return len(response) % 2
