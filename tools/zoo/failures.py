"""The known failures: each changes engine, trainer or record as the real one would, and by as much.

`CASES` names them all, the healthy ones among them; `make` plays one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_vespo.evidence import Evidence
from tools.zoo.nets import EXPERTS, LAYERS, VOCABULARY, Net, usual_experts
from tools.zoo.scene import Record, Scene, Size, evidence, new_scene, play, replay

WRONG_LAYER = 2


@dataclass(frozen=True)
class Case:
    """One inhabitant of the zoo."""

    cause: str
    """What the doctor should say: a name of diagnose/causes.py, "healthy" among them."""
    what: str
    """In plain words."""
    scene: Callable[[Scene], Scene] = lambda scene: scene
    record: Callable[[Record], Record] = lambda record: record


@dataclass(frozen=True)
class Background:
    """What is no failure, and makes failures harder or easier to see."""

    engine_dtype: torch.dtype
    """The trainer computes in float32, where a case does not say otherwise."""
    replays: bool = False
    """Whether the trainer trains with the engine's experts."""


BACKGROUNDS = {
    "bfloat16": Background(torch.bfloat16),
    "bfloat16, replayed": Background(torch.bfloat16, replays=True),
    "float32": Background(torch.float32),
}
"""By name."""


def make(name: str, seed: int, *, size: Size | None = None, background: str = "bfloat16") -> Evidence:
    """The evidence of one case; `seed` is of weights, prompts and sampling."""
    case, before = CASES[name], BACKGROUNDS[background]
    scene = replace(new_scene(seed, size, engine_dtype=before.engine_dtype), replays=before.replays)
    scene = case.scene(scene)
    return evidence(replay(case.record(play(scene)), scene), f"{name}, seed {seed}, {background}")


# ------------------------------------------------------------------------------------- engine and trainer


def _engine(scene: Scene, **changes: object) -> Scene:
    return replace(scene, engine=replace(scene.engine, **changes))


def _served(scene: Scene, net: Net) -> Scene:
    return _engine(scene, net=net.copy(scene.engine.net.model.dtype))


def lag(scene: Scene) -> Scene:
    return replace(scene, gaps=(0, 1, 2, 3))


def long_responses(scene: Scene) -> Scene:
    """By four, and a third as many of them."""
    most = 4 * scene.size.response_tokens[1]
    size = replace(scene.size, prompts=max(1, scene.size.prompts // 3), response_tokens=(most // 2, most))
    return replace(scene, size=size)


def short_responses(scene: Scene) -> Scene:
    size = replace(scene.size, prompts=3 * scene.size.prompts, response_tokens=(4, 16))
    return replace(scene, size=size)


def coarse_trainer(scene: Scene) -> Scene:
    return replace(scene, trainer=scene.trainer.copy(torch.bfloat16, attention="eager"))


def unsteady_trainer(scene: Scene) -> Scene:
    scene = coarse_trainer(scene)
    scene.trainer.make_unsteady(scene.seed)
    return scene


def old_weights(scene: Scene) -> Scene:
    return _served(scene, scene.versions[-2])


def wrong_expert(scene: Scene) -> Scene:
    """Its weights are those of another layer, as after a wrong name in a push."""
    net = scene.versions[-1].copy()
    (expert,) = usual_experts(net, WRONG_LAYER, 1)
    with torch.no_grad():
        for wrong, given in zip(
            net.experts[WRONG_LAYER].parameters(), net.experts[0].parameters(), strict=True
        ):
            wrong[expert] = given[expert]
    return _served(scene, net)


def _swapped(scene: Scene, *, with_router: bool) -> Scene:
    net = scene.versions[-1].copy()
    pair = usual_experts(net, WRONG_LAYER, 2)
    parts = [
        *net.experts[WRONG_LAYER].parameters(),
        *(net.routers[WRONG_LAYER].parameters() if with_router else ()),
    ]
    with torch.no_grad():
        for weight in parts:
            weight[pair] = weight[pair[::-1]]
    return _served(scene, net)


def swapped_experts(scene: Scene) -> Scene:
    return _swapped(scene, with_router=False)


def renamed_experts(scene: Scene) -> Scene:
    return _swapped(scene, with_router=True)


def temperature(scene: Scene) -> Scene:
    """The trainer takes it for 1, and so does the engine's prefill."""
    return _engine(scene, temperature=0.9)


def raw_logp(scene: Scene) -> Scene:
    """Sampled and trained at 0.9; the engine reports log-probs of its logits as they are."""
    scene = _engine(scene, temperature=0.9, logp=lambda logits, temperature, top_p: logits.log_softmax(-1))
    return replace(scene, trainer_temperature=0.9)


def nucleus(scene: Scene) -> Scene:
    return _engine(scene, top_p=0.9, logp=_renormalised)


def nucleus_unnoticed(scene: Scene) -> Scene:
    return _engine(scene, top_p=0.9)


def _renormalised(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    probability, token = (logits / temperature).softmax(-1).sort(-1, descending=True)
    kept = probability.masked_fill(probability.cumsum(-1) - probability >= top_p, 0)
    return torch.zeros_like(kept).scatter(-1, token, kept / kept.sum(-1, keepdim=True)).log()


def coarse_logp(scene: Scene) -> Scene:
    return _engine(
        scene,
        logp=lambda logits, temperature, top_p: (logits / temperature).bfloat16().log_softmax(-1).float(),
    )


def wrong_prompt_token(scene: Scene) -> Scene:
    """As when the server renders another chat template than the trainer."""

    def other(ids: Tensor) -> Tensor:
        ids = ids.clone()
        ids[:, scene.size.shared_tokens - 1] = (ids[:, scene.size.shared_tokens - 1] + 1) % VOCABULARY
        return ids

    return _engine(scene, prompts=other)


def wrong_attention(scene: Scene) -> Scene:
    """One layer's output projection is that of another layer."""
    net = scene.versions[-1].copy()
    layers = net.model.model.layers
    layers[WRONG_LAYER].self_attn.o_proj.load_state_dict(layers[0].self_attn.o_proj.state_dict())
    return _served(scene, net)


def stale_cache(scene: Scene) -> Scene:
    """The keys and values of the prompts' beginnings outlived a push."""
    return _engine(scene, prefix=scene.versions[-2].copy(scene.engine.net.model.dtype))


# ----------------------------------------------------------------------------------------------- the record


def _both(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """Change whatever the engine says of its experts, [B, W, L, K]."""
    changed = {who: change(record.experts[who]) for who in ("behavior", "engine")}
    return replace(record, experts={**record.experts, **changed})


def _behavior(record: Record, experts: Tensor) -> Record:
    return replace(record, experts={**record.experts, "behavior": experts})


def layer_offset(record: Record) -> Record:
    return _both(record, lambda experts: experts.roll(1, 2))


def row_shift(record: Record) -> Record:
    """Response rows begin one late, as when prompt and response are spliced wrongly."""
    experts = record.experts["behavior"].clone()
    experts[:, 1:] = record.experts["behavior"][:, :-1]
    return _behavior(record, experts)


def logp_shift(record: Record) -> Record:
    logp = {**record.logp, "behavior_logp": record.logp["behavior_logp"].roll(1, 1)}
    return replace(record, logp=logp)


def other_sample(record: Record) -> Record:
    """Routes of the sequence before."""
    return _behavior(record, record.experts["behavior"].roll(1, 0))


def some_other_samples(record: Record) -> Record:
    """Routes of one in eight sequences were exchanged with the next one's but three."""
    experts = record.experts["behavior"].clone()
    places = torch.arange(0, len(experts) - 4, 8)
    experts[places], experts[places + 4] = (
        record.experts["behavior"][places + 4],
        record.experts["behavior"][places],
    )
    return _behavior(record, experts)


def last_prompt_row(record: Record) -> Record:
    """The row of the prompt's last token was never written (SGLang issue 20964)."""
    experts = record.experts["behavior"].clone()
    experts[torch.arange(len(experts)), record.num_prompt - 1] = 0
    return _behavior(record, experts)


def zero_rows(record: Record) -> Record:
    """The prompt's rows are missing in every third sequence, as after a hit in the prefix cache."""
    experts = record.experts["behavior"].clone()
    is_prompt = torch.arange(experts.shape[1]) < record.num_prompt[:, None] - 1
    is_prompt[np.arange(len(experts)) % 3 > 0] = False
    experts[is_prompt] = 0
    return _behavior(record, experts)


def physical_experts(record: Record) -> Record:
    """Ids of places instead of experts, as under expert-parallel load balancing."""
    generator = torch.Generator().manual_seed(int(record.ids.sum()))
    order = torch.stack([torch.randperm(EXPERTS, generator=generator) for _ in range(LAYERS)])
    layers = torch.arange(LAYERS)[:, None]
    return _both(record, lambda experts: order[layers, experts])


def noise(record: Record) -> Record:
    generator = torch.Generator().manual_seed(int(record.ids.sum()))

    def noisy(logp: Tensor) -> Tensor:
        return logp + 0.3 * torch.randn(logp.shape, generator=generator)

    engine = {name: noisy(record.logp[name]) for name in ("behavior_logp", "engine_logp")}
    return replace(record, logp={**record.logp, **engine})


CASES = {
    "healthy": Case("healthy", "bfloat16 engine, float32 trainer"),
    "healthy, both bfloat16": Case("healthy", "the trainer is no more exact than the engine", coarse_trainer),
    "healthy, unsteady trainer": Case(
        "healthy", "the trainer never computes the same twice", unsteady_trainer
    ),
    "healthy, stale data": Case("healthy", "data of four weight versions, rightly labelled", lag),
    "healthy, long": Case("healthy", "responses of 128 to 256 tokens", long_responses),
    "healthy, short": Case("healthy", "responses of 4 to 16 tokens", short_responses),
    "old weights": Case("old_weights", "the engine serves the version before", old_weights),
    "wrong attention": Case("old_weights", "a projection of one layer holds other weights", wrong_attention),
    "wrong expert": Case("wrong_expert", "one expert of one layer holds other weights", wrong_expert),
    "swapped experts": Case("wrong_expert", "two experts of one layer are swapped", swapped_experts),
    "renamed experts": Case("expert_ids", "two experts and their router rows are swapped", renamed_experts),
    "physical experts": Case("expert_ids", "ids name places, not experts", record=physical_experts),
    "layer offset": Case("layer_offset", "routes belong to the layer before", record=layer_offset),
    "row shift": Case("row_shift", "routes belong to the token before", record=row_shift),
    "logp shift": Case("logp_shift", "log-probs belong to the token before", record=logp_shift),
    "temperature": Case("temperature", "sampled at 0.9, trained at 1.0", temperature),
    "raw log-probs": Case("temperature", "sampled and trained at 0.9, log-probs at 1.0", raw_logp),
    "top-p": Case("top_p", "log-probs are renormalised over a nucleus of 0.9", nucleus),
    "top-p unnoticed": Case(
        "top_p", "tokens come from a nucleus of 0.9, log-probs do not", nucleus_unnoticed
    ),
    "bfloat16 log-softmax": Case("coarse_logp", "log-probs were rounded to bfloat16", coarse_logp),
    "chat template": Case(
        "prompt_tokens", "the engine read one other token in the prompt", wrong_prompt_token
    ),
    "other sample": Case("other_sample", "routes belong to another sequence", record=other_sample),
    "some other samples": Case(
        "other_sample", "routes of a quarter of the sequences are exchanged", record=some_other_samples
    ),
    "last prompt row": Case(
        "missing_rows", "routes of the prompt's last token are missing", record=last_prompt_row
    ),
    "zero rows": Case("missing_rows", "routes of some prompts were never recorded", record=zero_rows),
    "noise": Case("noise", "log-probs carry noise of 0.3 nats", record=noise),
    "stale cache": Case("stale_cache", "prompts were cached under the weights before", stale_cache),
}
"""By name."""
