"""Tiny Qwen3-MoE networks in transformers, whose routers can be recorded and replayed.

Weights are random but not bland: routers prefer experts, experts matter, and next-token distributions are sharp in
places, so that the arithmetic of bfloat16 flips some percent of the choices and log-probs suffer as those of real models do.

Shape key:  B sequences, N tokens, V vocabulary, L layers, E experts, K experts per token.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

LAYERS, EXPERTS, TOPK, VOCABULARY = 5, 16, 4, 264

_SPREAD = {"lm_head": 6.0, "mlp.gate": 3.0, "down_proj": 4.0, "o_proj": 3.0}
"""By what the weights of these modules exceed the plain initialization."""


@dataclass(frozen=True)
class Pass:
    """What one forward pass computed."""

    logits: Tensor
    """[B, N, V] float32"""
    scores: Tensor
    """[B, N, L, E] float32, router logits."""
    chosen: Tensor
    """[B, N, L, K] what the routers' own scores chose, whether it was used or not."""


class Net:
    """One network in one dtype: a version of the weights as one engine computes with them."""

    def __init__(self, model: Any) -> None:
        """`model`: a Qwen3MoeForCausalLM."""
        self.model = model.eval()
        self._calls: list[tuple[Tensor, Tensor]] = []
        self._replayed: Tensor | None = None
        for layer, router in enumerate(self.routers):
            router.register_forward_hook(lambda router, _, out, layer=layer: self._route(router, layer, out))

    @property
    def routers(self) -> list[Any]:
        return [layer.mlp.gate for layer in self.model.model.layers]

    @property
    def experts(self) -> list[Any]:
        return [layer.mlp.experts for layer in self.model.model.layers]

    def copy(self, dtype: torch.dtype = torch.float32, *, attention: str = "sdpa") -> Net:
        """The same weights, rounded to `dtype`; other kernels for the attention are another engine's arithmetic."""
        model: Any = Qwen3MoeForCausalLM(copy.deepcopy(self.model.config))
        model.load_state_dict(self.model.state_dict())
        model.set_attn_implementation(attention)
        return Net(model.to(dtype))

    def make_unsteady(self, seed: int) -> None:
        """Let every pass round the experts' sums otherwise, as where their addends arrive in any order."""
        generator = torch.Generator().manual_seed(seed)

        def shake(module: nn.Module, inputs: object, out: Tensor) -> Tensor:
            noise = torch.randn(out.shape, generator=generator)
            return (out.float() * (1 + torch.finfo(out.dtype).eps / 4 * noise)).to(out.dtype)

        for experts in self.experts:
            experts.register_forward_hook(shake)

    @torch.no_grad()
    def forward(
        self, ids: Tensor, *, cache: DynamicCache | None = None, replayed: Tensor | None = None
    ) -> Pass:
        """Process [B, N] tokens after those in the cache, with the experts `replayed` [B, N, L, K] where given.

        An expert that is named twice counts once, as in Megatron-Core, and its second share of the gate weight is lost.
        """
        self._calls, self._replayed = [], replayed
        out = self.model(ids, past_key_values=cache, use_cache=cache is not None)
        scores, chosen = (torch.stack(parts, 1) for parts in zip(*self._calls, strict=True))
        size = (*ids.shape, scores.shape[1], -1)
        return Pass(out.logits.float(), scores.reshape(size), chosen.reshape(size))

    def _route(
        self, router: nn.Module, layer: int, out: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, chosen = out
        self._calls.append((logits.float(), chosen))
        if self._replayed is None:
            return out
        used = self._replayed[:, :, layer].reshape(chosen.shape)
        weights = logits.float().softmax(-1).gather(1, used)
        weights = weights / weights.sum(-1, keepdim=True)
        repeats = (used[:, :, None] == used[:, None, :]).tril(-1).any(-1)
        return logits, weights.masked_fill(repeats, 0).to(logits.dtype), used


def new_net(seed: int) -> Net:
    """A random network in float32."""
    config: Any = Qwen3MoeConfig(  # type: ignore[call-arg]  # head_dim
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=32,
        num_experts=EXPERTS,
        num_experts_per_tok=TOPK,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.06,
        output_router_logits=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight *= next((factor for part, factor in _SPREAD.items() if part in name), 1.0)
    net = Net(model)
    _balance(net, seed)
    return net


@torch.no_grad()
def _balance(net: Net, seed: int) -> None:
    """Let no router prefer experts whatever the token, as training for balance does; the first layer first."""
    for router in net.routers:
        seen: list[Tensor] = []
        ids = _text(net, seed)
        hook = router.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        net.forward(ids)
        hook.remove()
        mean = seen[0].flatten(0, -2).mean(0)
        router.weight -= torch.outer(router.weight @ mean, mean) / mean.square().sum()


def usual_experts(net: Net, layer: int, num: int) -> list[int]:
    """The experts of a layer whose load is closest to the average."""
    load = net.forward(_text(net, layer)).chosen[:, :, layer].flatten().bincount(minlength=EXPERTS)
    return (load - load.float().mean()).abs().argsort()[:num].tolist()


def _text(net: Net, seed: int, rounds: int = 4) -> Tensor:
    """[B, N] nearly as the network itself would write: every token drawn after those of the round before."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (32, 48), generator=generator)
    for _ in range(rounds):
        probability = net.forward(ids[:, :-1]).logits.softmax(-1).flatten(0, 1)
        ids[:, 1:] = torch.multinomial(probability, 1, generator=generator).view(len(ids), -1)
    return ids


def next_versions(net: Net, num: int, *, seed: int, learning_rate: float = 3e-4) -> list[Net]:
    """`net` and what becomes of it in `num` updates: Adam on sequences that are rewarded at random."""
    generator = torch.Generator().manual_seed(seed)
    model: Any = copy.deepcopy(net.copy().model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    versions = [net]
    for _ in range(num):
        ids = torch.randint(VOCABULARY, (16, 32), generator=generator)
        advantage = torch.randn(16, 1, generator=generator)
        logp = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        optimizer.zero_grad()
        (-(advantage * logp).mean()).backward()
        optimizer.step()
        versions.append(Net(copy.deepcopy(model)).copy())
    return versions
