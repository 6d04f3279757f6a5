"""The reader is strict, and its messages name the field, the value and the way out."""

from pathlib import Path

import pytest

from megatron_vespo.config import ConfigError, TrainConfig, load_config, parse_config, to_toml

MINIMAL = """
run_dir = "runs/x"
model = "m"
[trainer.optimizer]
learning_rate = 1e-6
[rollout]
sync_backend = "gloo"
[prompts]
train = "train.parquet"
max_prompt_tokens = 1024
[sampling]
max_response_tokens = 1024
[loop]
num_steps = 10
prompts_per_step = 4
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(TrainConfig, path, overrides)
    return str(caught.value)


def test_the_resolved_configuration_reads_back_equal(minimal, tmp_path):
    cfg = load_config(
        TrainConfig, minimal, ["loop.max_staleness=3", "trainer.layout.tensor=2", "model=some/dir"]
    )
    assert (cfg.loop.max_staleness, cfg.trainer.layout.tensor, cfg.model) == (3, 2, Path("some/dir"))
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(to_toml(cfg))
    assert load_config(TrainConfig, resolved) == cfg


def test_an_unknown_key_names_its_near_miss(minimal):
    assert "unknown field 'trainer.layout.tensr': did you mean 'trainer.layout.tensor'?" in refused(
        minimal, "trainer.layout.tensr=2"
    )
    assert "unknown field 'loop.zzz': known here: num_steps, " in refused(minimal, "loop.zzz=2")


def test_every_problem_is_listed_at_once(minimal):
    message = refused(minimal, "loop.num_steps='10'", "rollout.device=gpu", "loop.group_size=1", "lop.x=1")
    assert "4 problem(s)" in message
    assert "loop.num_steps = '10': input should be a valid integer" in message
    assert "rollout.device = 'gpu': input should be 'cpu' or 'cuda'" in message
    assert "loop.group_size = 1: input should be greater than or equal to 2" in message
    assert "unknown field 'lop': did you mean 'loop'?" in message


def test_a_missing_field_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing field 'loop\.num_steps': it has no default"):
        parse_config(TrainConfig, {"loop": {"prompts_per_step": 1}})


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["trainer.layout.tensor=2", "trainer.layout.expert_tensor=1"], "wrong expert gradients"),
        (
            [
                "trainer.device=cpu",
                "trainer.layout.expert=2",
                "trainer.layout.expert_tensor=2",
                "trainer.token_dispatcher=alltoall",
            ],
            "it needs an all-gather of unequal parts, which gloo does not have",
        ),
        (["trainer.device=cpu", "trainer.optimizer.cpu_offload=0.5"], "is in host memory already"),
        (["loop.updates_per_batch=3"], "loop.updates_per_batch = 3: must divide loop.prompts_per_step = 4"),
        (["trainer.router_replay=trainer"], "with loop.updates_per_batch = 1 there are no others"),
        (
            ["trainer.router_replay=engine", "rollout.record_experts=false"],
            "trainer.router_replay = 'engine': repeats the engine's expert choices",
        ),
        (["rollout.context_length=2000"], "rollout.context_length = 2000: must be at least"),
        (["rollout.sync_backend=nccl", "trainer.device=cpu"], "needs trainer.device = 'cuda'"),
        (["rollout.sync_timeout_s=700.0"], "must be below trainer.collective_timeout_s"),
        (["algorithm.vespo.lam=[-3.0, 2.0]"], "algorithm.vespo.lam.0 = -3.0: input should be greater than 0"),
        (["algorithm.vespo.k=[nan, 2.0]"], "algorithm.vespo.k.0"),
        (["algorithm.grpo.dual_clip=5.0"], "algorithm: grpo = ...: is not used with name = 'vespo'"),
        (
            ["algorithm.vespo.budget=1.0", "algorithm.vespo.ess_target=0.5"],
            "ess_target = 0.5: tempers the kernel",
        ),
        (["algorithm.correction.kind=icepop"], "it would count twice; set reference = 'proximal'"),
        (
            ["algorithm.correction.band=[0.5, 2.0]"],
            "band = (0.5, 2.0): bounds a correction, and kind = 'none'",
        ),
        (
            ["algorithm.vespo.noise_aware=true", "algorithm.reference=proximal"],
            "with reference = 'proximal' there is none in it",
        ),
        (
            ["algorithm.name=reinforce", "algorithm.reference=proximal"],
            "changes nothing with name = 'reinforce'",
        ),
        (["algorithm.name=reinforce", "algorithm.zero_mean=true"], "zero_mean = True: changes nothing"),
        (["algorithm.reference=proximal"], "every ratio is 1"),
        (
            ["algorithm.name=bapo", "algorithm.bapo.low=[0.9, 0.8]"],
            "low = [0.9, 0.8]: expected (first, last)",
        ),
        (["algorithm.name=seq_mis", "algorithm.seq_mis.band=[0.5, 0.9]"], "input should be greater than 1"),
        (["algorithm.min_living_weight=0.3"], "loop.updates_per_batch = 1 has none"),
        (["algorithm.kl_reference=other"], "is not used with kl_coeff = 0"),
        (
            ["trainer.optimizer.betas=[0.9, 1.0]"],
            "trainer.optimizer.betas.1 = 1.0: input should be less than 1",
        ),
    ],
)
def test_combinations_that_cannot_work_are_refused(minimal, overrides, expected):
    assert expected in refused(minimal, *overrides)


def test_a_method_brings_its_own_aggregation_and_says_whether_it_needs_the_whole_update(minimal):
    def algorithm(*overrides: str):
        return load_config(TrainConfig, minimal, overrides).algorithm

    assert algorithm().resolved_aggregation == "token_mean" and not algorithm().needs_whole_update
    assert algorithm("algorithm.name=gspo").resolved_aggregation == "seq_mean_token_mean"
    assert algorithm("algorithm.name=topr").resolved_aggregation == "seq_mean_token_sum"
    same = algorithm("algorithm.name=gspo", "algorithm.aggregation=token_mean")
    assert same.resolved_aggregation == "token_mean"
    assert algorithm("algorithm.name=m2po").needs_whole_update
    assert algorithm("algorithm.vespo.ess_target=0.5").needs_whole_update


def test_files_and_overrides_that_are_no_toml_are_refused(minimal, tmp_path):
    assert "no such file" in refused(tmp_path / "absent.toml")
    assert "no such file" in refused(tmp_path)
    assert "expected dotted.key=value" in refused(minimal, "loop.num_steps")
    assert "'model' is a value, not a table" in refused(minimal, "model.path=3")
    minimal.write_text("a = = 1")
    assert "expected TOML" in refused(minimal)


@pytest.mark.parametrize("address", ["9400", ":9400", "host:", "host:http", "host:0", "host:65536"])
def test_prometheus_needs_a_host_and_a_port(minimal, address):
    assert f"prometheus = '{address}': expected host:port" in refused(minimal, f"prometheus='{address}'")


@pytest.mark.parametrize(
    "override", ["instruments.every=-1", "instruments.sequences=0", "instruments.expert_tokens=0"]
)
def test_instruments_measure_something_or_nothing_but_no_less(minimal, override):
    field, _, value = override.partition("=")
    assert f"{field} = {value}: " in refused(minimal, override)
