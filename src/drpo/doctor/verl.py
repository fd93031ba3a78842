"""``drpo doctor --verl``: whether verl would compute what its configuration seems to ask for."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drpo.doctor.findings import Finding, Verdict
from drpo.doctor.recipe import ANCHORS, describe_objective
from drpo.doctor.verl_machine import check_chat_template, check_paths, check_reward
from drpo.doctor.verl_values import ACTOR, CORRECTION, LOSS, ROLLOUT, check_names, check_values, get
from drpo.doctor.verl_worker import check_worker
from drpo.errors import UserError
from drpo.registry import unknown_name


def examine_file(path: Path, overrides: Sequence[str] = (), *, workers: bool = True) -> list[Finding]:
    """Everything that can be said of a configuration of verl without its model.

    Args:
        path: a configuration that ``--config-path`` and ``--config-name`` would take, or one that verl has composed.
        overrides: of Hydra, as on verl's command line.
        workers: whether to start Ray and look for the loss in a worker.

    Raises:
        UserError: there is nothing to examine, or no verl.
    """
    try:
        from drpo.integrations.verl import LOSS_MODES
    except ImportError as error:
        raise UserError(f"--verl {path}: {error}") from error
    from drpo.integrations.verl.hydra import compose_file

    config = compose_file(path, overrides)
    if not _is_of_verl(config):
        raise UserError(f"--verl {path}: has no {LOSS}; expected a configuration of verl's PPO trainer")
    findings = examine_config(config)
    mode = get(config, f"{LOSS}.loss_mode")
    if workers and mode in LOSS_MODES and all(finding.verdict != "stop" for finding in findings):
        findings += check_worker(mode, get(config, "actor_rollout_ref.model.external_lib"))
    return findings


def examine_config(config: Any) -> list[Finding]:
    """What can be said of a composed configuration of verl's PPO trainer without Ray."""
    if wrong := list(check_values(config)):
        return wrong
    checks = (
        *(_check_loss, _check_settings, _check_anchor, _check_routers, _check_update, _check_micro_batches),
        *(_check_trainer, check_names, check_paths, check_reward, check_chat_template),
    )
    findings = [finding for check in checks for finding in check(config)]
    if all(finding.verdict != "stop" for finding in findings):
        findings += _check_as_verl_does(config)
    return findings


def _is_of_verl(config: Any) -> bool:
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    try:
        return isinstance(config, DictConfig) and get(config, LOSS) is not None
    except OmegaConfBaseException:  # an interpolation that leads nowhere
        return False


def _check_loss(config: Any) -> Iterator[Finding]:
    """The loss as verl's workers make it from the configuration."""
    from hydra.errors import InstantiationException
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
    from verl.utils.config import omega_conf_to_dataclass

    from drpo.integrations.verl import LOSS_MODES
    from drpo.integrations.verl.config import objective_of

    mode = str(get(config, f"{LOSS}.loss_mode"))
    if mode not in POLICY_LOSS_REGISTRY:
        yield Finding("stop", f"{LOSS}.loss_mode: {unknown_name('loss_mode', mode, POLICY_LOSS_REGISTRY)}")
        return
    try:
        actor: Any = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        objective = objective_of(actor) if mode in LOSS_MODES else None
    except InstantiationException as error:
        yield Finding.of_error(error.__cause__ or error)
    except ValueError as error:
        yield Finding.of_error(error)
    else:
        if objective is not None:
            yield from describe_objective(objective, f"loss {mode}: ", f"++{LOSS}.hyperparameters.delta=0.2")
        else:
            yield from _check_loss_of_verl(actor, mode)


def _check_loss_of_verl(actor: Any, mode: str) -> Iterator[Finding]:
    yield Finding("ok", f"loss {mode}: verl's own")
    if mode == "dro":
        yield Finding(
            "warning",
            "loss_mode=dro is verl's Direct Reward Optimisation, not DRPO",
            f"{LOSS}.loss_mode=drpo, if DRPO is meant",
        )
    if mode in ("dppo_tv", "dppo_kl") and actor.clip_ratio_c < 20:
        yield Finding(
            "stop",
            f"verl's {mode} truncates the ratio at {ACTOR}.clip_ratio_c={actor.clip_ratio_c:g}, which the paper found "
            f"unstable; its threshold is clip_ratio_low and clip_ratio_high ({actor.clip_ratio_high:g})",
            f"{LOSS}.loss_mode=drpo/{mode}, which has neither, or {ACTOR}.clip_ratio_c=1000",
        )


@dataclass(frozen=True)
class _Setting:
    """A setting, the values at which all is well (the first is the one to write), and why others are not well."""

    key: str
    right: tuple[Any, ...]
    why: str
    verdict: Verdict = "stop"


_FILTER = "samples come from a filtered distribution, the trainer's log-probs from the whole"

_REFERENCE = (
    "a penalty on the distance from a reference model is added to the objective, which bounds that from μ by itself"
)

_SETTINGS = (
    _Setting("trainer.use_v1", (True, None), "the legacy trainer overwrites loss_mode"),
    _Setting(f"{ROLLOUT}.top_p", (1, None), _FILTER),
    _Setting(f"{ROLLOUT}.top_k", (-1, 0, None), _FILTER),
    _Setting(f"{ROLLOUT}.min_p", (0, None), f"{_FILTER}; verl's rollout has no such setting"),
    _Setting(f"{ROLLOUT}.repetition_penalty", (1, None), _FILTER),
    _Setting(
        f"{ROLLOUT}.do_sample",
        (True, None),
        "greedy samples are not of the distribution that the trainer scores",
    ),
    _Setting(
        f"{ROLLOUT}.logprobs_mode",
        ("processed_logprobs", "raw_logprobs", None),
        "the ratio needs log-probs of the sampled tokens",
    ),
    _Setting(
        f"{ACTOR}.fsdp_config.model_dtype",
        ("fp32", "float32", None),
        "most updates at a learning rate of 1e-6 are lost to rounding",
        "warning",
    ),
    _Setting(f"{ACTOR}.use_kl_loss", (False, None), _REFERENCE, "warning"),
    _Setting("algorithm.use_kl_in_reward", (False, None), _REFERENCE, "warning"),
)
"""What the paper's method needs of verl's settings, each by itself."""


def _check_settings(config: Any) -> Iterator[Finding]:
    for setting in _SETTINGS:
        if (value := get(config, setting.key)) not in setting.right:
            yield Finding(setting.verdict, f"{setting.key}={value}: {setting.why}", f"{setting.key}={setting.right[0]}")
    strategy = str(get(config, f"{ACTOR}.strategy"))
    if strategy.startswith("fsdp") and get(config, f"{ACTOR}.megatron"):
        yield Finding(
            "stop",
            f"{ACTOR}.megatron: is not read with {ACTOR}.strategy={strategy}",
            f"{ACTOR}.fsdp_config, or --config-name of a recipe with Megatron",
        )
    temperature = get(config, f"{ROLLOUT}.temperature")
    if temperature != 1 and get(config, f"{ROLLOUT}.logprobs_mode") == "raw_logprobs":
        yield Finding(
            "stop",
            f"{ROLLOUT}.logprobs_mode=raw_logprobs are log-probs at temperature 1, and tokens are drawn at {temperature:g}",
            f"{ROLLOUT}.logprobs_mode=processed_logprobs",
        )


_CORRECTIONS = ("token", "sequence")


def _check_anchor(config: Any) -> Iterator[Finding]:
    bypass = get(config, f"{CORRECTION}.bypass_mode")
    if bypass and not get(config, f"{ROLLOUT}.calculate_log_probs"):
        yield Finding(
            "stop",
            "bypass_mode takes the sampler's log-probs for the old policy's, and the sampler returns none",
            f"{ROLLOUT}.calculate_log_probs=True",
        )
    rollout_is = get(config, f"{CORRECTION}.rollout_is")
    if rollout_is not in (*_CORRECTIONS, None):
        yield Finding(
            "stop",
            f"{CORRECTION}.rollout_is: {unknown_name('rollout_is', str(rollout_is), _CORRECTIONS)}",
            f"{CORRECTION}.rollout_is=token, or null",
        )
    elif rollout_is and not bypass and not get(config, f"{ROLLOUT}.calculate_log_probs"):
        yield Finding(
            "stop",
            f"{CORRECTION}.rollout_is={rollout_is} weighs by the sampler's log-probs, and the sampler returns none",
            f"{ROLLOUT}.calculate_log_probs=True",
        )
    yield Finding("ok", f"anchor: {ANCHORS['sampler' if bypass else 'old']}")


def _check_routers(config: Any) -> Iterator[Finding]:
    """Whether what records the experts of a mixture, and what replays them, belong together."""
    mode_key = f"{ACTOR}.{get(config, f'{ACTOR}.strategy')}.router_replay.mode"
    recording_key = f"{ROLLOUT}.enable_rollout_routing_replay"
    mode, is_recorded = get(config, mode_key) or "disabled", get(config, recording_key)
    if mode == "R3" and not is_recorded:
        yield Finding(
            "stop", f"{mode_key}=R3 replays the sampler's experts, which it does not return", f"{recording_key}=True"
        )
    elif mode == "R2" and get(config, f"{CORRECTION}.bypass_mode"):
        yield Finding(
            "stop",
            f"{mode_key}=R2 replays the experts of the pass that recomputes old log-probs, which bypass_mode leaves out",
            f"{mode_key}=R3 and {recording_key}=True",
        )
    elif is_recorded and mode != "R3":
        yield Finding(
            "stop" if mode == "R2" else "warning",
            f"{recording_key}=True returns the sampler's experts, and nothing replays them",
            f"{mode_key}=R3, with Megatron or VeOmni",
        )


def _check_update(config: Any) -> Iterator[Finding]:
    prompts, samples = get(config, "data.train_batch_size"), get(config, f"{ROLLOUT}.n")
    batch, epochs = get(config, f"{ACTOR}.ppo_mini_batch_size"), get(config, f"{ACTOR}.ppo_epochs")
    updates = prompts // batch * epochs
    if prompts % batch:
        yield Finding(
            "stop",
            f"{ACTOR}.ppo_mini_batch_size={batch} prompts does not divide data.train_batch_size={prompts}",
            f"{ACTOR}.ppo_mini_batch_size={max(n for n in range(1, min(batch, prompts) + 1) if prompts % n == 0)}",
        )
    else:
        yield Finding(
            "ok",
            f"{prompts} prompts x {samples} = {prompts * samples} samples a rollout, {updates} updates of {batch * samples}"
            + (f" ({epochs} epochs)" if epochs > 1 else ""),
        )
    if updates == 1:
        yield Finding(
            "warning",
            "one update a rollout: π is what sampled, up to the engines' rounding, and a trust region has nothing to bound",
            f"{ACTOR}.ppo_mini_batch_size={max(1, prompts // 4)}",
        )
    if get(config, "algorithm.adv_estimator") == "grpo":
        if samples == 1:
            yield Finding("stop", "one sample a prompt: every advantage is 0", f"{ROLLOUT}.n=8")
        if get(config, "algorithm.norm_adv_by_std_in_grpo"):
            yield Finding(
                "warning",
                "advantages are divided by their group's standard deviation; the paper centers them only",
                "algorithm.norm_adv_by_std_in_grpo=False",
            )
    is_by_horizon = get(config, f"{ACTOR}.loss_agg_mode") == "seq-mean-token-sum-norm"
    if is_by_horizon and not get(config, f"{ACTOR}.loss_scale_factor"):
        yield Finding(
            "warning",
            "seq-mean-token-sum-norm divides by the padded length of each micro-batch, which differs between them",
            f"{ACTOR}.loss_scale_factor={get(config, 'data.max_response_length')}",
        )


def _check_micro_batches(config: Any) -> Iterator[Finding]:
    """Whether an update splits into micro-batches of FSDP's ranks, which verl finds out after the first rollout."""
    parallel = get(config, f"{ACTOR}.ulysses_sequence_parallel_size") or 1
    longest = get(config, "data.max_prompt_length") + get(config, "data.max_response_length")
    if get(config, f"{ACTOR}.use_dynamic_bsz"):
        limit = get(config, f"{ACTOR}.ppo_max_token_len_per_gpu")
        if limit * parallel < longest:
            yield Finding(
                "stop",
                f"{ACTOR}.ppo_max_token_len_per_gpu={limit} is below the longest sequence, {longest} tokens of prompt and "
                "response",
                f"{ACTOR}.ppo_max_token_len_per_gpu={-(-longest // parallel)}",
            )
        return
    size = get(config, f"{ACTOR}.ppo_micro_batch_size_per_gpu")
    ranks = max(1, get(config, "trainer.n_gpus_per_node") * get(config, "trainer.nnodes") // parallel)
    update = get(config, f"{ACTOR}.ppo_mini_batch_size") * get(config, f"{ROLLOUT}.n")
    if size and str(get(config, f"{ACTOR}.strategy")).startswith("fsdp") and update // ranks % size:
        yield Finding(
            "stop",
            f"{ACTOR}.ppo_micro_batch_size_per_gpu={size} does not divide the {update // ranks} samples of an update on each "
            f"of {ranks} ranks",
            f"{ACTOR}.ppo_micro_batch_size_per_gpu={math.gcd(size, update // ranks)}",
        )


def _check_trainer(config: Any) -> Iterator[Finding]:
    """Whether verl has the trainer, and whether a trainer beside its sampler gets as many prompts as it trains on."""
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    mode = str(get(config, "trainer.v1.trainer_mode") or "sync")
    if mode not in TRAINER_REGISTRY:
        yield Finding(
            "stop",
            f"trainer.v1.trainer_mode: {unknown_name('trainer', mode, TRAINER_REGISTRY)}",
            "trainer.v1.trainer_mode=sync",
        )
    elif mode == "separate_async":
        key = "trainer.v1.separate_async.parameter_sync_step"
        prompts, batch, steps = (
            get(config, name) for name in ("data.train_batch_size", f"{ACTOR}.ppo_mini_batch_size", key)
        )
        if prompts != steps * batch:
            yield Finding(
                "stop",
                f"{key}={steps} updates of {batch} prompts are not the {prompts} of data.train_batch_size",
                f"{key}={prompts // batch}",
            )


def _check_as_verl_does(config: Any) -> Iterator[Finding]:
    """What verl itself refuses at once."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    try:
        # It prints that it is content, and warns that there is no critic.
        with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()):
            validate_config(config, need_reference_policy(config), need_critic(config))
    except Exception as error:  # an assertion or any other, each in its own words
        # The engine only has to be where verl's trainer runs.
        is_elsewhere = "vllm version None" in str(error)
        yield Finding("warning" if is_elsewhere else "stop", f"verl refuses: {error}")
    else:
        yield Finding("ok", "verl's own checks pass")
