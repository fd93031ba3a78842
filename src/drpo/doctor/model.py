"""What a model folder says before its weights are loaded: tokenizer, dropout, sampling, LM head."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl.trainer.utils import disable_dropout_in_model

from drpo.data.problems import BUILTIN_MODELS
from drpo.doctor.findings import Finding
from drpo.errors import UserError
from drpo.rollout.audit import find_dropout
from drpo.rollout.sampling import FILTERS, NEUTRAL, sampling_mismatches
from drpo.run.build import make_lora
from drpo.run.recipe import Recipe
from drpo.trainer.config import DRPOConfig


@dataclass(frozen=True)
class Blank:
    """A model without its weights.

    Args:
        name: the folder or the name on the hub.
        tokenizer: of the model.
        policy: on the device ``meta``, with the recipe's adapters.
        generation: what generation_config.json says, or what follows from config.json without one.
        template_options: what the trainer gives to the chat template.
    """

    name: str
    tokenizer: Any
    policy: Any
    generation: GenerationConfig
    template_options: dict[str, Any]

    @property
    def file(self) -> str:
        """Where a file of the model is, up to its name."""
        return f"{self.name.rstrip('/')}/"

    @property
    def eos_ids(self) -> list[int]:
        """What ends a completion, as TRL takes it: the tokenizer's and the model's."""
        given = self.generation.eos_token_id
        ids = given if isinstance(given, list) else [given]
        return [i for i in dict.fromkeys([self.tokenizer.eos_token_id, *ids]) if i is not None]


def load_blank(recipe: Recipe, config: DRPOConfig | None) -> Blank:
    """Read everything of a model but its weights.

    Args:
        recipe: that names it.
        config: of its trainer, if there is one.

    Raises:
        UserError: it cannot be read, or is of a kind that cannot be trained.
    """
    source = str(BUILTIN_MODELS.get(recipe.model, recipe.model))
    _check_settings(Path(source))
    try:
        # Transformers would ask whether to run the code in a folder, and wait for an answer.
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", trust_remote_code=False)
        shape = AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):
            policy = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    except Exception as error:  # a damaged folder fails in as many ways as there are files in it
        raise UserError(
            f"model: cannot load {recipe.model!r} ({str(error)[:200]}); expected {', '.join(BUILTIN_MODELS)}, a folder "
            "saved by Transformers, or a model on the Hugging Face hub that is reachable or in its cache",
            fix=f"a config.json in which both agree, as it was saved with the model in {source}"
            if "Class validation error" in str(error)
            else None,
        ) from error
    try:
        generation = GenerationConfig.from_pretrained(source)
    except OSError:
        generation = policy.generation_config
    if config is not None and config.disable_dropout:
        disable_dropout_in_model(policy)
    if lora := make_lora(recipe):
        from peft import get_peft_model

        try:
            policy = get_peft_model(policy, lora)
        except ValueError as error:
            raise UserError(f"lora: {error}; expected target_modules of this model, or all-linear") from error
    options: Any = config and config.chat_template_kwargs
    return Blank(recipe.model, tokenizer, policy, generation, options or {})


def _check_settings(folder: Path) -> None:
    """Some of these Transformers needs, and others it leaves out without a word if they cannot be read."""
    adapters = folder / "adapter_config.json"
    if adapters.is_file() and not (folder / "config.json").exists():
        raise UserError(
            f"model: {folder} has adapters and no model",
            fix="the folder of the model that they belong to, saved after merge_and_unload() of the two",
        )
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        file = folder / name
        try:
            if file.is_file():
                json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"model: {file} cannot be read ({error})", fix=f"valid JSON in {file}") from error


def check_tokenizer(blank: Blank) -> Iterator[Finding]:
    """Special tokens, and whether every token has a row of the embedding."""
    tokenizer, found = blank.tokenizer, False
    settings = f"{blank.file}tokenizer_config.json"
    if not tokenizer("1", add_special_tokens=False)["input_ids"]:
        yield Finding(
            "stop",
            "tokenizer: makes no tokens of text",
            f"the tokenizer's files, such as tokenizer.json, in {blank.name}",
        )
        return
    if not blank.eos_ids:
        found = True
        yield Finding(
            "stop",
            "tokenizer: neither it nor the model has an end-of-sequence token, so every completion runs to its limit",
            f"eos_token in {settings}",
        )
    if tokenizer.pad_token is None:
        found = True
        yield Finding(
            "warning" if tokenizer.eos_token else "stop",
            "tokenizer: has no padding token"
            + ("; TRL pads with the end-of-sequence token" if tokenizer.eos_token else ""),
            f"pad_token in {settings}",
        )
    rows = blank.policy.get_input_embeddings().weight.shape[0]
    if (largest := max(tokenizer.get_vocab().values(), default=0)) >= rows:
        found = True
        yield Finding(
            "stop",
            f"tokenizer: has token {largest}, and the model's embedding {rows} rows",
            f"the tokenizer that the model was trained with, in {blank.file}",
        )
    beyond = [i for i in blank.eos_ids if i >= rows]
    if beyond:
        found = True
        yield Finding(
            "stop",
            f"tokenizer: eos_token_id {beyond[0]} is none of {rows} tokens",
            f"eos_token_id in {blank.file}generation_config.json",
        )
    if not found:
        ends = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in blank.eos_ids)
        yield Finding("ok", f"tokenizer: {len(tokenizer):,} tokens, completions end with {ends}")


def check_dropout(blank: Blank) -> Iterator[Finding]:
    """Whether the trainer's forward pass is the sampler's."""
    if (place := find_dropout(blank.policy)) is None:
        yield Finding("ok", "dropout: none")
        return
    settings = blank.policy.config.to_dict()
    named = [n for n, v in settings.items() if ("drop" in n) and isinstance(v, float) and v > 0] or [place]
    yield Finding(
        "stop",
        f"dropout: {', '.join(f'{n}={settings[n]}' if n in settings else n for n in named)} makes the trainer's log-probs "
        "other than the sampler's",
        ", ".join(f"{name}: 0.0" for name in named) + f" in {blank.file}config.json",
    )


_UNUSABLE = (
    ("stop_strings", (None,), "for which Transformers needs a tokenizer that TRL does not give it"),
    ("num_return_sequences", (None, 1), "and TRL counts one completion for each prompt that it gives"),
)
"""Settings of generation that no rollout works with, and the values at which they are nothing."""


def check_generation(blank: Blank) -> Iterator[Finding]:
    """Whether Transformers can sample with what the model brings, for TRL."""
    for name, neutral, why in _UNUSABLE:
        if (value := getattr(blank.generation, name, None)) not in neutral:
            yield Finding(
                "stop",
                f"sampling: generation_config.json of the model has {name}={value}, {why}",
                f"no {name} in {blank.file}generation_config.json",
            )


def check_adapters(blank: Blank, recipe: Recipe) -> Iterator[Finding]:
    """Whether each of several names of modules is one; peft is content with the first."""
    wanted = recipe.lora.target_modules if recipe.lora is not None else ()
    modules = [name for name, _ in blank.policy.named_modules()]
    for target in wanted if isinstance(wanted, (list, tuple)) else ():
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            yield Finding(
                "warning", f"lora: the model has no module {target!r}", f"lora.target_modules without {target!r}"
            )


def check_sampling(blank: Blank, config: DRPOConfig) -> Iterator[Finding]:
    """Whether samples come from the distribution that the trainer scores."""
    asked = {name: getattr(config, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
    asked |= config.generation_kwargs if isinstance(config.generation_kwargs, dict) else {}
    # What TRL leaves open, Transformers takes from the model's own settings; do_sample is always asked for.
    replayed = FILTERS if config.replay_support else ()
    left = {
        name: value
        for name, value in blank.generation.to_dict().items()
        if name in NEUTRAL.keys() - {"do_sample", *replayed} and asked.get(name) is None and value not in NEUTRAL[name]
    }
    left = {} if config.use_vllm else left
    for name, value in left.items():
        yield Finding(
            "stop",
            f"sampling: generation_config.json of the model has {name}={value}, which changes what is sampled from and not "
            "what is scored",
            f"no {name} in {blank.file}generation_config.json" + (", or trainer.min_p: 0.0" if name == "min_p" else ""),
        )
    mismatches = sampling_mismatches(config.temperature, asked, config.replay_support)
    for mismatch in mismatches:
        fix = "temperature at the top of the recipe, and none in trainer.generation_kwargs"
        yield Finding("stop", f"sampling: {mismatch}", fix if mismatch.startswith("temperature") else "their defaults")
    if not left and not mismatches:
        filters = [f"{n}={asked[n]}" for n in NEUTRAL if asked.get(n) not in NEUTRAL[n]]
        said = f"{', '.join(filters)} on both sides (replay_support)" if filters else "no filters"
        yield Finding("ok", f"sampling: temperature {config.temperature:g} on both sides, {said}")


def check_positions(blank: Blank, config: DRPOConfig, lengths: Sequence[int]) -> Iterator[Finding]:
    """Whether prompts and completions fit into the positions that the model knows.

    Args:
        blank: the model.
        config: of the trainer.
        lengths: of the prompts, in tokens.
    """
    known = getattr(blank.policy.config.get_text_config(), "max_position_embeddings", None)
    limit = min((n for n in (known, config.vllm_max_model_length if config.use_vllm else None) if n), default=None)
    completion = config.max_completion_length or 0
    longest = max(lengths)
    if limit is None or longest + completion <= limit:
        yield Finding(
            "ok",
            f"length: prompts to {longest:,} tokens and completions to {completion:,}"
            + (f" of {limit:,}" if limit else ""),
        )
        return
    too_long = sum(n + completion > limit for n in lengths)
    yield Finding(
        "stop",
        f"length: {too_long:,} prompts, the longest of {longest:,} tokens, leave less than max_completion_length "
        f"{completion:,} of the model's {limit:,} positions",
        f"max_completion_length: {limit - longest}"
        if limit > longest
        else f"no prompts beyond {limit - completion:,} tokens",
    )
