"""Chunked vocab-parallel log-probs, entropies and top-k masses against full logits in float64, on one and two ranks."""

from __future__ import annotations

import collections
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vespo.trainer.logprobs import TILE_ROWS, Head, token_stats

WIDE = 2 * TILE_ROWS + 700
"""Vocabulary of three blocks of rows, the last one smaller."""


class OneRank:
    """The part of a process group that one rank needs."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def head(temperature=1.0, chunk_tokens=3, top_k=0):
    return Head(
        group=OneRank(),
        sequence_parallel=False,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        top_k=top_k,
    )


def case(vocab, *, num=11, s=8, b=2, h=6, seed=0):
    """Hidden states, head, positions and labels; labels include the first and the last row."""
    torch.manual_seed(seed)
    hidden, weight = torch.randn(s, b, h), torch.randn(vocab, h) / 2
    at, label = torch.randperm(s * b)[:num].clone(), torch.randint(0, vocab, (num,))
    label[:2] = torch.tensor([0, vocab - 1])[:num]
    return hidden, weight, at, label


def full_logits(hidden, weight, at, label, temperature, top_k=1):
    """Plain torch in float64; differentiable in its first two arguments."""
    logp = torch.log_softmax(hidden.double().flatten(0, 1)[at] @ weight.double().T / temperature, -1)
    p = logp.exp()
    mass = p.topk(min(top_k, p.shape[1])).values.sum(-1)
    return logp[torch.arange(len(at)), label], -(p * logp).sum(-1), mass


def gradients(stats, leaves, upstream_logp, upstream_entropy):
    """Of the weighted sum of log-probs and entropies; an upstream of None leaves its output out of the graph."""
    terms = [
        (x * u).sum() for x, u in zip(stats, (upstream_logp, upstream_entropy), strict=True) if u is not None
    ]
    return torch.autograd.grad(sum(terms), leaves)


def assert_close(got, want, tolerance=2e-5):
    """Relative to the largest number of the tensor: gradients sum thousands of terms of both signs."""
    assert (got.double() - want.double()).abs().max() <= tolerance * want.abs().max().clamp(min=1)


def test_log_prob_entropy_and_top_k_mass_of_a_hand_made_head():
    # logits 0, ln 2, ln 5 -> probabilities 1/8, 2/8, 5/8
    weight = torch.log(torch.tensor([[1.0], [2.0], [5.0]]))
    stats = token_stats(torch.ones(1, 1, 1), weight, torch.tensor([0]), torch.tensor([2]), head(top_k=2))
    p = torch.tensor([1 / 8, 2 / 8, 5 / 8])
    torch.testing.assert_close(stats.logp, p[2:].log())
    torch.testing.assert_close(stats.entropy, -(p * p.log()).sum()[None])
    torch.testing.assert_close(stats.top_k_mass, torch.tensor([7 / 8]))


def test_gradients_of_a_hand_made_head():
    # z = h w with h = 1 and p = 1/4, 3/4:  d logp_1 / d w = (-1/4, 1/4);  d H / d w_j = -p_j (log p_j + H)
    weight = torch.log(torch.tensor([[1.0], [3.0]])).requires_grad_()
    stats = token_stats(torch.ones(1, 1, 1), weight, torch.tensor([0]), torch.tensor([1]), head())
    (of_logp,) = torch.autograd.grad(stats.logp, weight, retain_graph=True)
    torch.testing.assert_close(of_logp, torch.tensor([[-0.25], [0.25]]))
    p = torch.tensor([[0.25], [0.75]])
    entropy = -(p * p.log()).sum()
    (of_entropy,) = torch.autograd.grad(stats.entropy, weight)
    torch.testing.assert_close(of_entropy, -p * (p.log() + entropy))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize("vocab", [13, WIDE])
def test_values_and_gradients_are_those_of_full_logits(vocab, chunk_tokens, temperature):
    hidden, weight, at, label = case(vocab)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    upstream = torch.randn(2, len(at))
    stats = token_stats(*leaves, at, label, head(temperature, chunk_tokens, top_k=5))
    logp, entropy, mass = full_logits(*leaves, at, label, temperature, top_k=5)
    assert_close(stats.logp, logp, 1e-6)
    assert_close(stats.entropy, entropy, 1e-6)
    assert_close(stats.top_k_mass, mass, 1e-6)
    for upstreams in [(upstream[0], None), (None, upstream[1]), (upstream[0], upstream[1])]:
        stats = token_stats(*leaves, at, label, head(temperature, chunk_tokens))
        expected = full_logits(*leaves, at, label, temperature)
        for got, want in zip(
            gradients(stats[:2], leaves, *upstreams), gradients(expected[:2], leaves, *upstreams), strict=True
        ):
            assert_close(got, want)


def test_top_k_larger_than_the_vocabulary_has_all_of_the_mass():
    stats = token_stats(*case(7), head(top_k=9))
    torch.testing.assert_close(stats.top_k_mass, torch.ones(11))


def test_top_k_mass_is_left_out_when_not_asked_for():
    assert token_stats(*case(7), head()).top_k_mass is None


def test_numbers_of_bfloat16_models_are_not_rounded_to_bfloat16():
    hidden, weight, at, label = case(WIDE, h=64)
    leaves = hidden.bfloat16().requires_grad_(), (weight / 4).bfloat16().requires_grad_()
    upstream = torch.randn(2, len(at))
    stats = token_stats(*leaves, at, label, head(0.7, 2))
    expected = full_logits(*leaves, at, label, 0.7)
    assert (stats.logp - expected[0]).abs().max() < 1e-5
    assert (stats.entropy - expected[1]).abs().max() < 1e-5
    got = gradients(stats[:2], leaves, *upstream)
    assert all(x.dtype == torch.bfloat16 for x in got)
    for x, want in zip(got, gradients(expected[:2], leaves, *upstream), strict=True):
        torch.testing.assert_close(x, want, rtol=2**-7, atol=1e-6)  # rounded once, at the end


def test_logits_of_a_hundred_thousand_nats_stay_exact():
    weight = torch.tensor([[1e5], [1e5 - 0.5], [-1e5]], requires_grad=True)
    hidden = torch.ones(1, 1, 1, requires_grad=True)
    at, label = torch.tensor([0]), torch.tensor([0])
    stats = token_stats(hidden, weight, at, label, head())
    logp, entropy, _ = full_logits(hidden, weight, at, label, 1.0)
    torch.testing.assert_close(stats.logp, logp.float())
    torch.testing.assert_close(stats.entropy, entropy.float())
    upstream = torch.tensor([2.0]), torch.tensor([3.0])
    (got,) = gradients(stats[:2], weight, *upstream)
    (want,) = gradients((logp, entropy), weight, *upstream)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    least = token_stats(hidden, weight, at, torch.tensor([2]), head()).logp
    torch.testing.assert_close(least, full_logits(hidden, weight, at, torch.tensor([2]), 1.0)[0].float())


def test_a_position_scored_twice_gets_both_gradients():
    hidden, weight, _, _ = case(13)
    at, label, upstream = torch.tensor([3, 3]), torch.tensor([1, 8]), torch.tensor([1.0, 2.0])
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    got = gradients(token_stats(*leaves, at, label, head())[:2], leaves, upstream, None)
    want = gradients(full_logits(*leaves, at, label, 1.0)[:2], leaves, upstream, None)
    for x, y in zip(got, want, strict=True):
        assert_close(x, y)


def test_a_microbatch_without_responses_has_zero_gradient():
    hidden, weight, at, label = case(7, num=0)
    hidden.requires_grad_(), weight.requires_grad_()
    stats = token_stats(hidden, weight, at, label, head(top_k=2))
    (stats.logp.sum() + stats.entropy.sum()).backward()
    assert all(len(x) == 0 for x in stats)
    assert not hidden.grad.any() and not weight.grad.any()


def test_a_state_that_is_not_a_number_is_seen_in_its_own_tokens_only():
    hidden, weight, _, _ = case(13)
    hidden[2, 1] = torch.nan
    at = torch.arange(16)
    stats = token_stats(hidden, weight, at, torch.zeros(16, dtype=torch.int64), head())
    assert stats.logp.isnan().tolist() == [i == 5 for i in range(16)]
    assert stats.entropy.isnan().tolist() == [i == 5 for i in range(16)]


# ---------------------------------------------------------------------------------------------- cost, without a clock


class Watch(TorchDispatchMode):
    """Elements of every storage that torch hands out, those alive together, and multiply-adds of products."""

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self._inputs = {x.untyped_storage().data_ptr() for x in inputs}
        self.largest = self.most_alive = self.product_size = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.addmm:
            self.product_size += args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self._note(x.untyped_storage(), x.element_size())
        return out

    def _note(self, storage, element_size) -> None:
        if storage.data_ptr() in self._inputs:
            return
        self._alive = {ref: num for ref, num in self._alive.items() if not ref.expired()}
        self._alive[StorageWeakRef(storage)] = num = storage.nbytes() // element_size
        self.largest = max(self.largest, num)
        self.most_alive = max(self.most_alive, sum(self._alive.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_more_than_two_tiles_never_exist(dtype):
    chunk_tokens, num, h = 4, 64, 2
    hidden, weight, at, label = case(WIDE, num=num, s=num, h=h)
    leaves = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    tile, of_weight = chunk_tokens * WIDE, WIDE * h
    small = (
        12 * num * 5 + 6 * 2 * num * h
    )  # [S] statistics of each block, and hidden states with their gradients
    block = (
        3 * TILE_ROWS * h
    )  # of the head: where it is bfloat16 this and the next one, float32; sums of its gradient
    with Watch(*leaves) as forward:
        stats = token_stats(*leaves, at, label, head(0.9, chunk_tokens, top_k=2))
    assert tile * 0.9 < forward.largest <= tile < num * WIDE / 10
    assert forward.most_alive <= 2 * tile + block + small
    with Watch(*leaves) as backward:
        torch.autograd.grad(stats.logp.sum(), leaves, retain_graph=True)
    assert backward.largest <= tile and backward.most_alive <= tile + block + of_weight + small
    with Watch(*leaves) as backward:
        torch.autograd.grad(stats.logp.sum() + stats.entropy.sum(), leaves)
    assert backward.largest <= tile and backward.most_alive <= 2 * tile + block + of_weight + small


def test_nothing_of_the_size_of_hidden_states_is_saved_but_the_inputs_themselves():
    hidden, weight, at, label = case(WIDE, h=32)
    hidden.requires_grad_(), weight.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        token_stats(hidden, weight, at, label, head(top_k=3))
    others = [x for x in saved if x.data_ptr() not in (hidden.data_ptr(), weight.data_ptr())]
    assert len(others) == len(saved) - 2
    assert all(x.untyped_storage().nbytes() <= len(at) * 8 for x in others)


def test_tokens_without_upstream_gradient_cost_no_product_in_the_backward():
    hidden, weight, at, label = case(WIDE, num=12)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    upstream_logp, upstream_entropy = torch.zeros(12), torch.zeros(12)
    upstream_logp[[2, 5, 7]], upstream_entropy[[5, 11]] = 1.5, -2.0
    stats = token_stats(*leaves, at, label, head())
    with Watch(*leaves) as backward:
        got = gradients(stats[:2], leaves, upstream_logp, upstream_entropy)
    assert backward.product_size == 3 * 4 * WIDE * 6  # logits again, and the two gradients, of 4 tokens
    want = gradients(full_logits(*leaves, at, label, 1.0)[:2], leaves, upstream_logp, upstream_entropy)
    for x, y in zip(got, want, strict=True):
        assert_close(x, y)


# ------------------------------------------------------------------------------------------------------ tensor ranks


RANK_CASES = [
    {"sequence_parallel": sp, "dtype": dtype, "vocab": vocab, "num": num}
    for sp in (False, True)
    for dtype, vocab, num in [
        (torch.float32, 26, 11),
        (torch.float32, 2 * (TILE_ROWS + 50), 11),
        (torch.bfloat16, 26, 11),
        (torch.float32, 26, 0),
    ]
]
COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")


def rank_case(sequence_parallel, dtype, vocab, num):
    """The whole of a case, and the upstream gradients of log-probs and entropies."""
    hidden, weight, at, label = case(vocab, num=num)
    return hidden.to(dtype), weight.to(dtype), at, label, torch.randn(2, num)


def serve_rank(rank, store, directory):
    """One of two tensor ranks: runs every case and writes what it got, and how many collectives it took."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    count = collections.Counter()
    for name in COLLECTIVES:
        setattr(dist, name, counted(name, getattr(dist, name), count))
    torch.save([run_rank(rank, of, count) for of in RANK_CASES], f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def counted(name, collective, count):
    def call(*args, **kwargs):
        count[name] += 1
        return collective(*args, **kwargs)

    return call


def run_rank(rank, of, count):
    hidden, weight, at, label, upstream = rank_case(**of)
    mine = hidden.chunk(2)[rank].clone() if of["sequence_parallel"] else hidden
    leaves = mine.requires_grad_(), weight.chunk(2)[rank].clone().requires_grad_()
    settings = Head(
        group=dist.group.WORLD,
        sequence_parallel=of["sequence_parallel"],
        temperature=0.8,
        chunk_tokens=3,
        top_k=20,
    )
    count.clear()
    stats = token_stats(*leaves, at, label, settings)
    forward = dict(count)
    count.clear()
    grads = gradients(stats[:2], leaves, *upstream)
    return {
        "stats": [x.detach() for x in stats], "grads": grads, "forward": forward, "backward": dict(count)
    }  # fmt: skip


@pytest.fixture(scope="module")
def rank_answers(tmp_path_factory):
    """[rank][case]; both processes start once."""
    directory = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        torch.multiprocessing.spawn(serve_rank, (directory / "store", directory), nprocs=2)
    return [torch.load(directory / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("index", range(len(RANK_CASES)), ids=[str(list(c.values())) for c in RANK_CASES])
def test_two_tensor_ranks_agree_with_full_logits(rank_answers, index):
    of = RANK_CASES[index]
    hidden, weight, at, label, upstream = rank_case(**of)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    expected = full_logits(*leaves, at, label, 0.8, top_k=20)
    of_hidden, of_weight = gradients(expected[:2], leaves, *upstream)
    answers = [of_rank[index] for of_rank in rank_answers]
    tolerance = 2e-5 if of["dtype"] == torch.float32 else 2**-8
    for rank, answer in enumerate(answers):
        for got, same, want in zip(answer["stats"], answers[0]["stats"], expected, strict=True):
            assert torch.equal(got, same)
            torch.testing.assert_close(got.double(), want.detach(), atol=2e-6, rtol=1e-6)
        want = of_hidden.chunk(2)[rank] if of["sequence_parallel"] else of_hidden
        assert_close(answer["grads"][0], want, tolerance)
        assert_close(answer["grads"][1], of_weight.chunk(2)[rank], tolerance)


@pytest.mark.parametrize("index", range(len(RANK_CASES)))
def test_collectives_are_one_for_statistics_and_one_for_the_gradient_and_the_gathers_of_slices(
    rank_answers, index
):
    of, answer = RANK_CASES[index], rank_answers[0][index]
    slices = {"all_gather_into_tensor": 1} if of["sequence_parallel"] else {}
    statistics = {"all_gather_into_tensor": min(of["num"], 1)}
    assert collections.Counter(answer["forward"]) == collections.Counter(slices) + collections.Counter(
        statistics
    )
    assert answer["backward"] == slices | {
        "reduce_scatter_tensor" if of["sequence_parallel"] else "all_reduce": 1
    }
