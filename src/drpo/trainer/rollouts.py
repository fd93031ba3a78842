"""What samples a rollout, what is recorded of it, and the log-probs that it must come with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from drpo.objectives import TopKObjective
from drpo.rollout.behavior_policy import BehaviorPolicy
from drpo.rollout.decoding import record_log_probs
from drpo.rollout.recorder import LogProbRecorder
from drpo.rollout.rollout_func import ROUTED_EXPERTS, SAMPLING_MASK, checked, pad_experts, pad_sampling_mask
from drpo.rollout.routing import find_routers
from drpo.trainer.batch import RolloutBatch, loss_mask

if TYPE_CHECKING:
    from trl.trainer.grpo_trainer import RolloutFunc

    from drpo.trainer.trainer import DRPOTrainer


@dataclass
class Rollout:
    """One rollout while it is sampled.

    Attributes:
        is_trained_on: unlike one of an evaluation.
        recorder: of the last call of ``generate``; None where another engine samples.
        returned: by a rollout function, beside what TRL knows.
    """

    is_trained_on: bool
    recorder: LogProbRecorder | None = None
    returned: dict[str, Any] = field(default_factory=dict)


class RolloutSampler:
    """Transformers' sampling of rollouts, with the log-probs of what is drawn.

    Args:
        behavior: what samples a rollout to be trained on; anything else is sampled from the policy as it is.
        top_k: of the likeliest tokens to record at each position.
        records_support: whether the tokens that could be drawn are recorded.
        records_experts: whether the experts that the model's routers choose are.

    Attributes:
        kept_mass: [2], of the last rollout that was trained on, on this rank: the probabilities that filters left, summed
            over tokens, and how many tokens; None without support.
    """

    def __init__(self, behavior: BehaviorPolicy, top_k: int, records_support: bool, records_experts: bool) -> None:
        self.behavior = behavior
        self.kept_mass: Tensor | None = None
        self._recorded: dict[str, Any] = {"top_k": top_k, "support": records_support, "experts": records_experts}
        self._rollout: Rollout | None = None

    @contextmanager
    def rollout(self, policy: nn.Module, is_trained_on: bool) -> Iterator[None]:
        """Within this context what is sampled belongs to one rollout."""
        if is_trained_on:
            self.behavior.begin_rollout(policy)
        self._rollout = Rollout(is_trained_on)
        try:
            yield
        finally:
            self._rollout = None

    @contextmanager
    def sampling(self, policy: Any) -> Iterator[LogProbRecorder]:
        """Within this context ``policy.generate`` records; outside of a rollout, sampled tokens' log-probs alone."""
        rollout = self._rollout
        with ExitStack() as stack:
            is_trained_on = rollout is not None and rollout.is_trained_on
            model = stack.enter_context(self.behavior.sampling(policy)) if is_trained_on else policy
            recorded = {} if rollout is None else self._recorded
            recorder = stack.enter_context(record_log_probs(model, **recorded))
            yield recorder
        if rollout is not None:
            rollout.recorder = recorder

    def sampling_elsewhere(self, rollout_func: RolloutFunc, needed: Sequence[str]) -> RolloutFunc:
        """The rollout function, held to what is needed of it; what TRL does not know is kept for the batch."""
        checked_func = checked(rollout_func, needed)
        is_recorded = {SAMPLING_MASK: self._recorded["support"], ROUTED_EXPERTS: self._recorded["experts"]}

        def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
            assert self._rollout is not None
            output = checked_func(prompts, trainer)
            returned = {name: output[name] for name in is_recorded if output.get(name) is not None}
            self._rollout.returned = {name: value for name, value in returned.items() if is_recorded[name]}
            # TRL hands on to the rewards what it does not know.
            return {name: value for name, value in output.items() if name not in is_recorded}

        return rollout

    def complete(self, batch: RolloutBatch) -> None:
        """Write what was recorded beside the sampled tokens' log-probs into the batch of this rollout, and the sampler's age."""
        rollout = self._rollout
        assert rollout is not None
        columns = batch["completion_ids"].shape[1]
        if rollout.recorder is not None and (likeliest := rollout.recorder.likeliest(columns)):
            batch["top_k_ids"], batch["top_k_per_token_logps"] = likeliest
        if rollout.recorder is not None and (support := rollout.recorder.support(columns)):
            batch["support_ids"], batch["kept_mass"] = support
        if rollout.recorder is not None:
            experts = rollout.recorder.experts(batch["prompt_ids"].shape[1], columns)
            if experts is not None:
                batch["prompt_experts"], batch["completion_experts"] = experts
        device = batch["completion_ids"].device
        if SAMPLING_MASK in rollout.returned:
            batch["support_ids"] = pad_sampling_mask(rollout.returned[SAMPLING_MASK], columns).to(device)
        if ROUTED_EXPERTS in rollout.returned:
            lengths = batch["prompt_mask"].sum(dim=1).tolist()
            experts = pad_experts(rollout.returned[ROUTED_EXPERTS], lengths, batch["prompt_ids"].shape[1], columns)
            batch["prompt_experts"], batch["completion_experts"] = (one.to(device) for one in experts)
        if rollout.is_trained_on:
            batch["age"] = torch.full_like(batch["advantages"], self.behavior.age, dtype=torch.long)

    def measure(self, batch: RolloutBatch) -> None:
        """Note what filters left of the probability in a rollout that will be trained on."""
        if "kept_mass" in batch:
            masses = batch["kept_mass"][loss_mask(batch).bool()]
            self.kept_mass = torch.stack([masses.sum(), masses.new_tensor(len(masses))])

    def metrics(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The age of the samples, and what filters left of the probability over all ranks, where they apply."""
        measured = {"rollout/age": float(self.behavior.age)} if self.behavior.lag else {}
        if self.kept_mass is not None:
            mass, tokens = gather(self.kept_mass).view(-1, 2).sum(dim=0).tolist()
            measured["rollout/kept_mass"] = mass / max(1, tokens)
        return measured

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, beside the past weights of ``behavior``."""
        return {"age": self.behavior.age, "kept_mass": self.kept_mass}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.behavior.age, self.kept_mass = state_dict["age"], state_dict["kept_mass"]


def make_rollout_sampler(trainer: DRPOTrainer) -> RolloutSampler:
    """What samples the rollouts of a trainer: its policy, or a copy that is older or in another precision.

    Raises:
        ValueError: something wanted of the sampler that this trainer's cannot do.
    """
    args, objective = trainer.args, trainer.objective
    precision, lag = args.rollout_precision, args.rollout_lag
    if precision == trainer.precision == "fp32":
        precision = None
    elif precision is None and lag and trainer.precision == "fp8":
        precision = "fp8"
    if lag or precision is not None:
        is_sharded = trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        _refuse_with(
            "rollout_precision and rollout_lag sample from a copy; they do not work with",
            ("a rollout_func, which samples by weights of its own", trainer.rollout_func is not None),
            ("adapters (peft)", trainer.bare_model is not trainer.policy),
            ("weights that are sharded over ranks", is_sharded),
        )
    top_k = objective.top_k if isinstance(objective, TopKObjective) else 0
    if top_k or args.replay_support:
        needed = "replay_support=True needs the tokens that could be drawn"
        if top_k:
            needed = f"objective={args.objective!r} needs log-probs of the sampler's likeliest tokens"
        has_rollout_func = trainer.rollout_func is not None
        _refuse_with(
            f"{needed}, as Transformers generation records them; it does not work with",
            ("vLLM, of which TRL keeps the sampled token's log-prob alone", trainer.use_vllm),
            ("a rollout_func, which returns the sampled tokens' log-probs alone", bool(top_k) and has_rollout_func),
            ("tools, whose turns are generated apart from one another", bool(trainer.tools)),
            ("cast_lm_head_to_fp32, which is TRL's fused head's", args.cast_lm_head_to_fp32),
        )
    has_routers = bool(find_routers(trainer.bare_model))
    samples_elsewhere = (
        ("vLLM, of which TRL keeps no experts", trainer.use_vllm),
        ("tools, whose turns are generated apart from one another", bool(trainer.tools)),
    )
    if args.router_replay:
        _refuse_with(
            "router_replay=True needs the experts that the sampler's routers choose; it does not work with",
            (f"a {type(trainer.bare_model).__name__}, which has no routers that are known", not has_routers),
            *samples_elsewhere,
        )
    records_experts = has_routers and not any(applies for _, applies in samples_elsewhere)
    behavior = BehaviorPolicy(trainer.bare_model, lag, precision, trainer.accelerator.autocast)
    return RolloutSampler(behavior, top_k, args.replay_support, records_experts)


def _refuse_with(message: str, *conflicts: tuple[str, bool]) -> None:
    """Raise a ValueError, the message and the first conflict that there is."""
    for name, is_there in conflicts:
        if is_there:
            raise ValueError(f"{message} {name}")


def check_log_probs(batch: RolloutBatch) -> None:
    """Check that a rollout says of every token that counts what it was sampled with.

    Raises:
        ValueError: there are no log-probs, or one is not finite.
    """
    if "sampling_per_token_logps" not in batch:
        raise ValueError(
            "the rollout returned no log-probs, so there is no behaviour policy to anchor the ratio on; "
            "return them from rollout_func as 'logprobs', or let Transformers or vLLM generate"
        )
    missing = (loss_mask(batch).bool() & ~batch["sampling_per_token_logps"].isfinite()).nonzero()
    if len(missing):
        row, token = missing[0].tolist()
        value = batch["sampling_per_token_logps"][row, token].item()
        raise ValueError(
            f"the sampler's log-prob of token {token} of completion {row} is {value}, and so for {len(missing)} tokens "
            "of this rollout; a ratio needs a finite anchor, and nothing was trained on the rollout"
        )
