"""drpo doctor --verl: what it finds in wrong configurations, that it finds nothing in the recipes, and how it answers."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from drpo.data.arithmetic import MODEL_PATH
from drpo.doctor import Finding
from drpo.doctor.verl import examine_file
from drpo.errors import UserError
from drpo.integrations.verl import PolicyLoss
from drpo.integrations.verl.hydra import compose_file
from drpo.recipes import FOLDER

RECIPES = FOLDER / "verl"
SETTINGS = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem not in ("paper", "moe"))
OBJECTIVES = sorted(path.stem for path in (RECIPES / "objective").glob("*.yaml"))
LOSS = "actor_rollout_ref.actor.policy_loss"


@pytest.fixture(scope="module", autouse=True)
def parse_each_file_once() -> Iterator[None]:
    """A configuration of verl's is some thirty files, and most of the time that composing takes goes into parsing them."""
    load = OmegaConf.load
    parsed: dict[str, Any] = {}

    def load_once(file: Any) -> Any:
        name = str(getattr(file, "name", file))
        if name not in parsed:
            parsed[name] = load(file)
        return copy.deepcopy(parsed[name])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OmegaConf, "load", load_once)
        yield


MOE = {"qwen3-30b-a3b-base", "qwen3-30b-a3b-base-fp8", "qwen3-30b-a3b-base-fp8-rollout", "qwen3.5-35b-a3b-base"}


def test_every_recipe_has_a_folder_of_its_own() -> None:
    delta = f"{LOSS}.hyperparameters.delta=0.2"
    names = [
        compose_file(RECIPES / f"{setting}.yaml", overrides).trainer.experiment_name
        for setting in SETTINGS
        for overrides in (*([f"objective={objective}"] for objective in OBJECTIVES), [delta])
    ]
    assert len(set(names)) == len(names) == 36
    # verl's file logger takes a slash for a folder.
    assert not any("/" in name for name in names)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_recipe_does_what_its_hardware_needs(setting: str) -> None:
    config = compose_file(RECIPES / f"{setting}.yaml")
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert config.trainer.max_actor_ckpt_to_keep == 2
    assert (actor.strategy == "megatron") is (setting in MOE)
    if setting in MOE:
        transformer = actor.megatron.override_transformer_config
        assert (transformer.recompute_granularity, transformer.recompute_num_layers) == ("full", 1)
        assert transformer.attention_dropout == transformer.hidden_dropout == 0
    if rollout.quantization == "fp8":
        # An expert's hidden units on each GPU, in blocks of 128.
        assert 768 % (rollout.tensor_model_parallel_size * 128) == 0
    if "fp8" in actor.get("megatron", {}).get("override_transformer_config", {}):
        assert actor.optim.override_optimizer_config.fp8_recipe == "blockwise"
        variables = config.ray_kwargs.ray_init.runtime_env.env_vars
        assert variables.NVTE_FP8_BLOCK_SCALING_FP32_SCALES == "1"
    # Megatron has no packed sequences for the gated delta net of Qwen3.5, and verl no dynamic batches without them.
    is_packed = setting != "qwen3.5-35b-a3b-base"
    assert actor.use_dynamic_bsz is rollout.log_prob_use_dynamic_bsz is is_packed
    assert config.actor_rollout_ref.model.use_remove_padding is is_packed
    assert setting not in MOE or actor.megatron.use_remove_padding is is_packed


def found(setting: str, *overrides: str) -> list[Finding]:
    return examine_file(RECIPES / f"{setting}.yaml", overrides, workers=False)


def test_there_are_thirty_recipes() -> None:
    assert (len(SETTINGS), len(OBJECTIVES)) == (6, 5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_recipe_composes_and_passes(setting: str, objective: str) -> None:
    findings = found(setting, f"objective={objective}")
    assert [finding for finding in findings if finding.verdict == "stop"] == []
    shown = "\n".join(finding.what for finding in findings)
    assert "anchor: the sampler" in shown
    assert "64 prompts x 8 = 512 samples a rollout, 4 updates of 128" in shown
    assert "verl's own checks pass" in shown
    assert all("delta = 12.5" in finding.what for finding in findings if finding.verdict == "warning")


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("drpo", "DRPO(delta=12.5)"),
        ("dppo_tv", "DPPOBinaryTV(delta=0.15)"),
        ("spo", "SPO(epsilon=12.5)"),
        ("ppo", "PPO(clip_low=0.2, clip_high=0.28)"),
        ("pg", "PG()"),
    ],
)
def test_the_recipes_have_the_paper_s_hyperparameters(objective: str, expected: str) -> None:
    from hydra.utils import instantiate

    loss = instantiate(
        compose_file(RECIPES / "qwen3-4b-base.yaml", [f"objective={objective}"]).actor_rollout_ref.actor.policy_loss
    )
    assert isinstance(loss, PolicyLoss)
    assert repr(loss.make_objective()) == expected


VERL_S_OWN = [
    f"{LOSS}._target_=verl.workers.config.PolicyLossConfig",
    *(f"~{LOSS}.{name}" for name in ("hyperparameters", "use_v1", "histograms")),
]

WRONG = [
    pytest.param([f"{LOSS}.loss_mode=drop"], "stop", "unknown loss_mode 'drop'; did you mean", "'dro' or 'drpo'", id="misspelt"),
    pytest.param(
        VERL_S_OWN,
        "stop", "does not say what loss_mode=drpo is anchored on", "_target_=drpo.integrations.verl.PolicyLoss", id="config-class",
    ),
    pytest.param(
        ["algorithm.rollout_correction.bypass_mode=false"],
        "stop", "takes its ratio against the sampler's log-probs", "bypass_mode=True", id="anchor",
    ),
    pytest.param(["trainer.use_v1=false"], "stop", "trainer.use_v1=False: the legacy trainer", "use_v1=True", id="legacy"),
    pytest.param([f"+{LOSS}.hyperparameters.dleta=1"], "stop", "did you mean 'delta'", "'delta'", id="hyperparameter"),
    pytest.param([f"{LOSS}.hyperparameters.delta=0"], "stop", "hyperparameters: delta is 0", "a finite number > 0", id="value"),
    pytest.param(
        ["objective=ppo", "actor_rollout_ref.actor.clip_ratio_high=0.28"],
        "stop", "clip_ratio_high=0.28 is not read by loss_mode=ppo", "hyperparameters", id="clip-ratio",
    ),
    pytest.param(
        [*VERL_S_OWN, f"{LOSS}.loss_mode=dppo_tv"],
        "stop", "truncates the ratio at actor_rollout_ref.actor.clip_ratio_c=3", "loss_mode=drpo/dppo_tv", id="truncation",
    ),
    pytest.param(
        [*VERL_S_OWN, f"{LOSS}.loss_mode=dro", f"{LOSS}.dro_beta=0.1"],
        "warning", "verl's Direct Reward Optimisation, not DRPO", "loss_mode=drpo", id="dro",
    ),
    pytest.param(
        ["algorithm.rollout_correction.rollout_is=token"],
        "stop", "rollout_is=token is not applied in bypass mode", "rollout_is=null", id="correction",
    ),
    pytest.param(
        ["actor_rollout_ref.rollout.calculate_log_probs=false"],
        "stop", "the sampler returns none", "calculate_log_probs=True", id="no-log-probs",
    ),
    pytest.param(["actor_rollout_ref.rollout.top_p=0.95"], "stop", "top_p=0.95: samples come from a filtered", "top_p=1", id="top-p"),
    pytest.param(["actor_rollout_ref.rollout.top_k=50"], "stop", "top_k=50", "top_k=-1", id="top-k"),
    pytest.param(
        ["actor_rollout_ref.rollout.temperature=0.7", "actor_rollout_ref.rollout.logprobs_mode=raw_logprobs"],
        "stop", "are log-probs at temperature 1", "processed_logprobs", id="temperature",
    ),
    pytest.param([f"{LOSS}.loss_mode=dppo_topk_tv", f"~{LOSS}.hyperparameters.delta"], "stop", "likeliest tokens", "an objective over sampled tokens", id="topk"),
    pytest.param(
        ["actor_rollout_ref.actor.ppo_mini_batch_size=48"],
        "stop", "does not divide data.train_batch_size=64", "ppo_mini_batch_size=32", id="divides",
    ),
    pytest.param(["actor_rollout_ref.actor.ppo_mini_batch_size=64"], "warning", "one update a rollout", "=16", id="one-update"),
    pytest.param(
        ["actor_rollout_ref.actor.loss_scale_factor=null"],
        "warning", "padded length of each micro-batch", "loss_scale_factor=8192", id="horizon",
    ),
    pytest.param(["actor_rollout_ref.rollout.n=1"], "stop", "every advantage is 0", "rollout.n=8", id="one-sample"),
    pytest.param(["algorithm.norm_adv_by_std_in_grpo=true"], "warning", "divided by their group's", "=False", id="std"),
    pytest.param(
        ["actor_rollout_ref.actor.fsdp_config.model_dtype=bf16"], "warning", "lost to rounding", "=fp32", id="bf16-weights"
    ),
    pytest.param(["actor_rollout_ref.actor.use_kl_loss=true"], "warning", "use_kl_loss=True: a penalty", "=False", id="kl-loss"),
    pytest.param(["algorithm.use_kl_in_reward=true"], "warning", "use_kl_in_reward=True: a penalty", "=False", id="kl-reward"),
    pytest.param(
        ["objective=ppo", "algorithm.rollout_correction.bypass_mode=false", "algorithm.rollout_correction.rollout_is=tokens"],
        "stop", "unknown rollout_is 'tokens'; did you mean 'token'?", "rollout_is=token", id="rollout-is",
    ),
    pytest.param(
        [
            "objective=ppo", "algorithm.rollout_correction.bypass_mode=false", "algorithm.rollout_correction.rollout_is=token",
            "actor_rollout_ref.rollout.calculate_log_probs=false",
        ],
        "stop", "rollout_is=token weighs by the sampler's log-probs", "calculate_log_probs=True", id="rollout-is-of-none",
    ),
    pytest.param(
        ["actor_rollout_ref.actor.ppo_max_token_len_per_gpu=9000"],
        "stop", "is below the longest sequence, 9216 tokens", "ppo_max_token_len_per_gpu=9216", id="token-budget",
    ),
    pytest.param(
        ["actor_rollout_ref.actor.use_dynamic_bsz=false", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=7"],
        "stop", "ppo_micro_batch_size_per_gpu=7 does not divide", "ppo_micro_batch_size_per_gpu=1", id="micro-batch",
    ),
    *(
        pytest.param(
            [f"actor_rollout_ref.model.path={path}"], "warning", f"model.path={path}: no such file", "every node", id=path
        )
        for path in ("/no/model", "./model", "models/qwen/4b")
    ),
    pytest.param(
        ["reward.custom_reward_function.path=no_reward.py"], "warning", "path=no_reward.py: no such file", "every node", id="reward"
    ),
    pytest.param(
        ["reward.custom_reward_function.name=compute_scor"],
        "stop", "cannot load compute_scor from pkg://drpo.integrations.verl.grader", "a function that", id="reward-name",
    ),
    pytest.param(
        ["reward.custom_reward_function.path=pkg://drpo.integrations.verl.gradr"],
        "stop", "cannot load compute_score from pkg://drpo.integrations.verl.gradr", "a function that", id="reward-module",
    ),
    pytest.param(
        ["reward.custom_reward_function.path=null"],
        "warning", "is not set: verl scores the data sources that it knows", "pkg://drpo.integrations.verl.grader", id="no-reward",
    ),
    *(
        pytest.param([f"{key}={value}"], "stop", f"{key}: unknown {key.rpartition('.')[2]} '{value}'", near, id=key)
        for key, value, near in (
            ("algorithm.adv_estimator", "grop", "did you mean 'grpo'"),
            ("actor_rollout_ref.actor.strategy", "fsdp3", "did you mean 'fsdp"),
            ("actor_rollout_ref.rollout.name", "hf", "Known: "),
            ("trainer.logger", "wandbb", "did you mean 'wandb'"),
        )
    ),
    pytest.param(
        ["trainer.experiment_name=a/b"], "stop", "experiment_name=a/b has a slash", "experiment_name=a-b", id="slash"
    ),
    pytest.param(
        ["trainer.v1.trainer_mode=fully"], "stop", "unknown trainer 'fully'", "trainer_mode=sync", id="trainer-mode"
    ),
    pytest.param(
        ["trainer.v1.trainer_mode=separate_async", "trainer.v1.separate_async.parameter_sync_step=2"],
        "stop", "parameter_sync_step=2 updates of 16 prompts are not the 64", "parameter_sync_step=4", id="sync-step",
    ),
    pytest.param(
        ["+actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2"],
        "stop", "actor.megatron: is not read with actor_rollout_ref.actor.strategy=fsdp2", "fsdp_config", id="megatron-in-fsdp",
    ),
    pytest.param(
        [f"actor_rollout_ref.model.path={MODEL_PATH}"],
        "stop", "its tokenizer has no chat template", "custom_chat_template='{{ messages[0].content }}'", id="chat-template",
    ),
    pytest.param(["actor_rollout_ref.actor.loss_agg_mode=mean"], "stop", "Invalid loss_agg_mode: mean", "", id="verl-s-own"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "verdict", "what", "fix"), WRONG)
def test_a_wrong_configuration_is_found_with_its_fix(overrides: list[str], verdict: str, what: str, fix: str) -> None:
    findings = found("qwen3-4b-base", *overrides)
    matching = [finding for finding in findings if what in finding.what and finding.verdict == verdict]
    assert matching, "\n".join(f"{f.verdict} {f.what}" for f in findings)
    assert any(fix in f"{finding.what} {finding.fix}" for finding in matching), matching


A, R = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
REPLAY, RECORD = f"{A}.megatron.router_replay.mode", f"{R}.enable_rollout_routing_replay"


@pytest.mark.parametrize(
    ("overrides", "verdict", "what"),
    [
        ([f"{REPLAY}=R3"], "stop", "replays the sampler's experts, which it does not return"),
        ([f"{REPLAY}=R2"], "stop", "which bypass_mode leaves out"),
        ([f"{RECORD}=true"], "warning", "nothing replays them"),
        ([f"{REPLAY}=R3", f"{RECORD}=true"], "ok", "verl's own checks pass"),
    ],
)
def test_experts_are_recorded_where_they_are_replayed(overrides: list[str], verdict: str, what: str) -> None:
    findings = found("qwen3-30b-a3b-base", *overrides)
    assert any(what in finding.what and finding.verdict == verdict for finding in findings), findings
    assert verdict == "stop" or all(finding.verdict != "stop" for finding in findings)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        *((f"{key}={value}", f"{key} is {value}; expected a whole number, at least 1")
          for key in (f"{A}.ppo_mini_batch_size", f"{A}.ppo_epochs", "data.train_batch_size", f"{R}.n", "trainer.n_gpus_per_node")
          for value in ("0", "null", "abc", "-4", "64.5")),
        (f"{LOSS}.hyperparameters=3", f"{LOSS}.hyperparameters is 3; expected a mapping"),
        (f"{LOSS}.hyperparameters=null", f"{LOSS}.hyperparameters is null; expected a mapping"),
        (f"{LOSS}=3", f"{LOSS} is 3; expected a mapping"),
        (f"{R}=null", f"{R} is null; expected a mapping"),
        ("algorithm.rollout_correction=3", "algorithm.rollout_correction is 3; expected a mapping"),
        (f"{A}.optim.lr=abc", f"{A}.optim.lr is abc; expected a number, at least 0"),
        (f"{R}.temperature=null", f"{R}.temperature is null; expected a number > 0"),
        ("algorithm.rollout_correction.bypass_mode=maybe", "bypass_mode is maybe; expected true or false"),
        ("data.max_response_length=${nothing}", "data.max_response_length: Interpolation key 'nothing' not found"),
        ("trainer.project_name=${nothing}", "Interpolation key 'nothing' not found"),
        (f"{R}.logprobs_mode=raw_logits", "logprobs_mode=raw_logits: the ratio needs log-probs"),
        (f"{R}.do_sample=False", "do_sample=False: greedy samples"),
        (f"+{R}.min_p=0.1", "min_p=0.1: samples come from a filtered distribution"),
        (f"+{R}.repetition_penalty=1.1", "repetition_penalty=1.1: samples come from a filtered distribution"),
    ],
)  # fmt: skip
def test_a_value_that_verl_cannot_compute_with_is_a_stop(override: str, expected: str) -> None:
    stops = [finding for finding in found("qwen3-4b-base", override) if finding.verdict == "stop"]
    assert any(expected in finding.what for finding in stops), stops


def test_of_a_partial_file_it_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("actor_rollout_ref: {actor: {policy_loss: {loss_mode: drpo}}}")
    findings = examine_file(path, workers=False)
    assert {finding.verdict for finding in findings} == {"stop"}
    assert "data is missing; expected a mapping" in [finding.what for finding in findings]


def test_what_a_plug_in_of_verl_prints_is_not_on_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loud.py").write_text("import os; os.write(1, b'loaded\\n'); os.system('echo loaded')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "loud")
    config = RECIPES / "qwen3-4b-base.yaml"
    command = [sys.executable, "-m", "drpo", "doctor", "--verl", str(config), "--no-workers", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert {row["verdict"] for row in json.loads(ended.stdout)} == {"ok", "warning"}
    assert ended.stderr.count("loaded\n") >= 2


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (None, [], "no such file"),
        ("a: [", [], "does not compose"),
        ("a: 1\n", [], "expected a configuration of verl's PPO trainer"),
        ("a: 1\n", ["b=2"], "does not compose"),
        ("a: \udcff\n", [], "does not compose .*utf-8"),
        ("3\n", [], "does not compose"),
        ("defaults: [a]\n", ["a=null"], "a=null: does not compose"),
    ],
)
def test_what_cannot_be_examined_is_said_in_one_line(
    tmp_path: Path, text: str | None, overrides: list[str], message: str
) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=message):
        examine_file(path, overrides, workers=False)


def test_a_hyperparameter_that_is_there_already_is_said_to_want_two_pluses() -> None:
    with pytest.raises(UserError, match=r"does not compose .*'\+\+\S+hyperparameters\.delta=0\.2'"):
        found("qwen3-4b-base", f"+{LOSS}.hyperparameters.delta=0.2")


def test_the_doctor_s_own_ray_leaves_nothing_in_the_home_folder(tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"} | {"HOME": str(tmp_path)}
    command = [sys.executable, "-m", "drpo", "doctor", "--verl", str(RECIPES / "qwen3-4b-base.yaml")]
    ended = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert "a Ray worker has loss drpo" in ended.stdout, ended.stderr
    assert not (tmp_path / ".ray").exists()


def test_a_configuration_that_verl_has_composed_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    OmegaConf.save(compose_file(RECIPES / "qwen3-4b-base.yaml"), path)
    assert not [finding for finding in examine_file(path, workers=False) if finding.verdict == "stop"]
