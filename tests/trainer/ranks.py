"""Real gloo ranks for tests: worker processes that import megatron once and then serve one grid after another."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo.config import AlgorithmConfig, TrainerConfig
from megatron_vespo.trainer import checkpoint
from megatron_vespo.trainer.layout import Place
from megatron_vespo.trainer.outputs import merge_examined, merge_scores, merge_step
from megatron_vespo.types import RunError


class Pool:
    """Worker processes; `grid` builds a trainer on the first n of them, after leaving the grid before."""

    def __init__(self, num: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.workers = []
        for _ in range(num):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self.workers.append((process, ours))

    def grid(self, cfg: TrainerConfig, model: Path, **options: Any) -> Grid:
        for i in range(len(self.workers)):
            self.workers[i][1].send(("leave", ()))
        self._answers(len(self.workers))
        world_size, port = cfg.layout.world_size, free_port()
        places = [
            Place(rank=r, world_size=world_size, master_addr="127.0.0.1", master_port=port)
            for r in range(world_size)
        ]
        settings = {"algorithm": AlgorithmConfig(name="reinforce"), "temperature": 1.0, "seed": 0} | options
        for (_, pipe), place in zip(self.workers, places, strict=False):
            pipe.send(("start", (cfg, model, settings, place)))
        self._answers(world_size)
        return Grid(self, world_size)

    def call(self, num: int, method: str, *args: Any) -> list[Any]:
        for _, pipe in self.workers[:num]:
            pipe.send((method, args))
        return self._answers(num)

    def answers(self, num: int, method: str, *args: Any) -> list[Any]:
        """Of every rank, exceptions among them."""
        for _, pipe in self.workers[:num]:
            pipe.send((method, args))
        return self._received(num)

    def _answers(self, num: int) -> list[Any]:
        answers = self._received(num)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    def _received(self, num: int) -> list[Any]:
        answers = []
        for rank, (process, pipe) in enumerate(self.workers[:num]):
            assert pipe.poll(120), f"rank {rank} gave no answer in 120 s (alive: {process.is_alive()})"
            answers.append(pipe.recv())
        return answers

    def close(self) -> None:
        for _, pipe in self.workers:
            pipe.close()
        for process, _ in self.workers:
            process.join(5)
            if process.is_alive():
                process.kill()


class Grid:
    """All ranks of one trainer, as a driver sees them."""

    def __init__(self, pool: Pool, world_size: int) -> None:
        self._pool, self._world_size = pool, world_size

    def call(self, method: str, *args: Any) -> list[Any]:
        return self._pool.call(self._world_size, method, *args)

    def answers(self, method: str, *args: Any) -> list[Any]:
        return self._pool.answers(self._world_size, method, *args)

    def step(self, sequences, step_number=0, routed=None, noise_variance=0.0):
        return merge_step(self.call("step", sequences, step_number, routed, noise_variance), sequences)

    def score(self, sequences):
        return merge_scores(self.call("score", sequences), sequences)

    def examine(self, sequences):
        return merge_examined(self.call("examine", sequences), sequences)

    def gradients(self, sequences) -> dict[str, np.ndarray]:
        """By Hugging Face name, before clipping; no weight changes."""
        return self.call("gradients", sequences)[0]

    def weights(self) -> dict[str, np.ndarray]:
        return self.call("weights")[0]

    def masters(self, kind: str) -> dict[str, np.ndarray]:
        """The optimizer's "weight", "exp_avg" or "exp_avg_sq", by Hugging Face name."""
        return self.call("masters", kind)[0]

    def save(self, directory: Path, step_number: int, state: dict[str, Any]) -> None:
        checkpoint.prepare(directory)
        self.call("begin_save", directory)
        self.commit(directory, step_number, state)

    def commit(self, directory: Path, step_number: int, state: dict[str, Any]) -> None:
        while None in (files := self.call("written", directory)):
            time.sleep(0.01)
        self._pool.call(1, "commit", directory, step_number, state, files)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _serve(pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    worker = _Worker()
    while True:
        try:
            method, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = getattr(worker, method)(*args)
        except Exception as err:  # noqa: BLE001  # a process boundary: the test process raises it again
            mine = isinstance(err, RunError | ValueError)
            answer = err if mine else RuntimeError(traceback.format_exc())
        pipe.send(answer)


class _Worker:
    """One rank: the methods that a `Grid` calls by name."""

    trainer: Any = None

    def start(self, cfg, model, settings, place) -> None:
        from megatron_vespo.trainer.step import TrainerRank

        self.trainer = TrainerRank(cfg, model, place=place, **settings)

    def leave(self) -> None:
        """Also after a `start` that failed half way."""
        import torch

        from megatron_vespo.trainer.layout import destroy_process_groups

        if self.trainer is not None:
            self.trainer.close()
            self.trainer = None
        elif torch.distributed.is_initialized():
            destroy_process_groups()
        gc.collect()  # or the threads of the old process groups stay

    def step(self, sequences, step_number, routed, noise_variance=0.0):
        return self.trainer.step(sequences, step_number, routed=routed, noise_variance=noise_variance)

    def score(self, sequences):
        return self.trainer.score(sequences)

    def examine(self, sequences):
        return self.trainer.examine(sequences)

    def weights(self) -> dict[str, np.ndarray]:
        return {name: tensor.float().numpy() for name, tensor in self.trainer.export()}

    def gradients(self, sequences) -> dict[str, np.ndarray]:
        from megatron_vespo.trainer.forward_backward import Mode
        from megatron_vespo.trainer.hf_weights import Export

        trainer = self.trainer
        trainer._optimizer.zero_grad()
        (work,) = trainer._works(sequences, 0.0)
        engine = trainer._cfg.router_replay == "engine"
        trainer._runner.run(work, Mode(train=True, replays_engine=engine))
        gradients = [
            _Tensors([(n, p.main_grad) for n, p in chunk.named_parameters()]) for chunk in trainer.chunks
        ]
        export = Export(gradients, trainer.shape, trainer.groups)
        return {name: tensor.numpy().copy() for name, tensor in export.run()}

    def weights_in_blocks(self, block_bytes) -> dict[str, np.ndarray]:
        from megatron_vespo.trainer.hf_weights import Export

        trainer = self.trainer
        export = Export(trainer.chunks, trainer.shape, trainer.groups, block_bytes=block_bytes)
        return {name: tensor.numpy() for name, tensor in export.run()}

    def save_hf(self, directory) -> None:
        self.trainer.save_hf(directory)

    def save_hf_in_files(self, directory, file_bytes) -> None:
        from megatron_vespo.trainer.hf_weights import save_hf

        trainer = self.trainer
        save_hf(trainer._export, trainer._source, directory, rank=trainer.groups.rank, file_bytes=file_bytes)

    def limit_file_size(self, num_bytes) -> None:
        """From now on the system refuses to make a file larger than that; -1: no limit."""
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))

    def begin_save(self, directory) -> None:
        self.trainer.begin_save(directory)

    def written(self, directory):
        return self.trainer.written(directory)

    def commit(self, directory, step_number, state, files) -> None:
        self.trainer.commit(directory, step_number, state, files)

    def masters(self, kind) -> dict[str, np.ndarray]:
        """Put together by collectives, not from files."""
        import torch
        from megatron.core import parallel_state

        from megatron_vespo.trainer.adam_state import held_ranges
        from megatron_vespo.trainer.hf_weights import Export, described

        trainer, groups = self.trainer, self.trainer.groups
        whole = {p: torch.zeros(p.shape) for chunk in trainer.chunks for p in chunk.parameters()}
        for held in held_ranges(trainer._optimizer.megatron):
            values = held.weight if kind == "weight" else held.moment(kind)
            whole[held.parameter].view(-1)[held.start : held.end] = values
        if trainer._cfg.optimizer.distributed:
            copies = {
                True: parallel_state.get_expert_data_parallel_group(),
                False: parallel_state.get_data_parallel_group(with_context_parallel=True),
            }
            for cut, parameter in described(trainer.chunks, trainer.shape, groups):
                torch.distributed.all_reduce(whole[parameter], group=copies[cut.is_expert])
        export = Export(
            [_Tensors([(n, whole[p]) for n, p in chunk.named_parameters()]) for chunk in trainer.chunks],
            trainer.shape,
            groups,
        )
        return {name: tensor.numpy().copy() for name, tensor in export.run()}

    def rounding_gap(self) -> float:
        """Largest |weight - its master weight, rounded| on this rank."""
        from megatron_vespo.trainer.adam_state import held_ranges

        gaps = []
        for held in held_ranges(self.trainer._optimizer.megatron):
            weight = held.parameter.detach().view(-1)[held.start : held.end]
            gaps.append(float((weight - held.weight.to(weight.dtype)).abs().max()))
        return max(gaps)

    def num_steps(self) -> int:
        return self.trainer.num_steps

    def load(self, directory):
        return self.trainer.load(directory)

    def save_megatron(self, directory, renamed) -> None:
        """As Megatron-LM does; parts of names are replaced as `renamed` says."""
        from megatron.core import dist_checkpointing

        multiprocessing.current_process()._config["daemon"] = False  # it writes through a process of its own
        state = {}
        for i, chunk in enumerate(self.trainer.chunks):
            state[f"model{i}"] = chunk.sharded_state_dict()
            for part in state[f"model{i}"].values():
                for old, new in renamed.items():
                    part.key = part.key.replace(old, new)
        dist_checkpointing.save(state | {"iteration": 7}, str(directory))

    def load_megatron(self, directory) -> None:
        self.trainer.load_megatron(directory)

    def megatron_version(self) -> str:
        import megatron.core

        return megatron.core.__version__

    def coordinates(self):
        """This rank's position as megatron's own globals have it."""
        from megatron.core import parallel_state as ps

        return {
            "tensor": ps.get_tensor_model_parallel_rank(),
            "context": ps.get_context_parallel_rank(),
            "data": ps.get_data_parallel_rank(),
            "pipeline": ps.get_pipeline_model_parallel_rank(),
            "expert": ps.get_expert_model_parallel_rank(),
            "expert_tensor": ps.get_expert_tensor_parallel_rank(),
            "expert_data": ps.get_expert_data_parallel_rank(),
        }

    def fill(self, suffix: str, value: float) -> None:
        """Overwrite the parameters whose names end so."""
        for chunk in self.trainer.chunks:
            for name, parameter in chunk.named_parameters():
                if name.endswith(suffix):
                    parameter.data.fill_(value)

    def poison(self, value: float) -> None:
        """Overwrite one weight of the last layer norm, on the ranks that hold it."""
        import torch

        with torch.no_grad():
            for name, parameter in self.trainer.chunks[-1].named_parameters():
                if name == "decoder.final_layernorm.weight":
                    parameter.fill_(value)

    def poison_output(self, context: int, token: int) -> None:
        """From now on the output for one packed token is not a number on this context rank."""

        def poisoned(model, inputs, hidden):
            hidden = hidden.clone()
            hidden[token, 0] = float("nan")
            return hidden

        if self.trainer.groups.at.context == context:
            self.trainer.chunks[-1].register_forward_hook(poisoned)


class _Tensors:
    """Looks like the model to `Export`, but its parameters are other tensors of the same shapes."""

    def __init__(self, tensors) -> None:
        self._tensors = tensors

    def named_parameters(self):
        return iter(self._tensors)

    def parameters(self):
        return (tensor for _, tensor in self._tensors)
