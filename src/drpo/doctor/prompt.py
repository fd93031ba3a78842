"""What the model is given: whether a prompt is in it once, and a turn begins and ends."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from drpo.data.problems import BUILTIN_MODELS, Problem, refuse_longer_prompts, tokenize_prompt
from drpo.doctor.findings import Finding
from drpo.errors import UserError
from drpo.run.checks import end_tokens, refuse_without_end
from drpo.run.recipe import Recipe
from drpo.trainer.config import DRPOConfig

_TOKENIZED = 200
"""Prompts, the longest by characters, that are tokenized."""

_QUESTION, _ANSWER = "seventeen", "seventeenseventeen"


@dataclass(frozen=True)
class Prompting:
    """What turns problems into tokens, and ends completions.

    Args:
        model: its name, for messages.
        tokenizer: of the model.
        template_options: what the trainer gives to the chat template.
        eos_ids: what ends a completion, as TRL takes it: the tokenizer's tokens and the model's.
        positions: how many the model knows, if it says so.
    """

    model: str
    tokenizer: Any
    template_options: dict[str, Any]
    eos_ids: list[int]
    positions: int | None

    def ids(self, problem: Problem) -> list[int]:
        """The tokens of a prompt, as the trainer sees them."""
        return tokenize_prompt(problem, self.tokenizer, **self.template_options)


def load_prompting(recipe: Recipe, config: DRPOConfig) -> Prompting:
    """Read everything that concerns prompts, and no weights.

    Raises:
        UserError: the model's files cannot be read.
    """
    source = str(BUILTIN_MODELS.get(recipe.model, recipe.model))
    try:
        # Transformers would ask whether to run the code in a folder, and wait for an answer.
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoConfig.from_pretrained(source, trust_remote_code=False)
        try:
            generation = GenerationConfig.from_pretrained(source)
        except OSError:  # a model without generation_config.json
            generation = GenerationConfig.from_model_config(model)
    except Exception as error:  # a damaged folder fails in as many ways as there are files in it
        raise UserError(
            f"model: cannot load {recipe.model!r}: expected {', '.join(BUILTIN_MODELS)}, a folder saved by Transformers, or "
            f"a model on the Hugging Face hub ({str(error)[:200]})"
        ) from error
    recipe.task.apply(tokenizer, generation)
    options: Any = config.chat_template_kwargs
    positions = getattr(model.get_text_config(), "max_position_embeddings", None)
    return Prompting(recipe.model, tokenizer, options or {}, end_tokens(tokenizer, generation), positions)


def check_end(prompting: Prompting) -> Iterator[Finding]:
    """Whether anything ends a completion."""
    refuse_without_end(prompting.model, prompting.tokenizer, prompting.eos_ids)
    ends = ", ".join(repr(prompting.tokenizer.convert_ids_to_tokens(i)) for i in prompting.eos_ids)
    yield Finding("ok", f"tokenizer: {len(prompting.tokenizer):,} tokens, completions end with {ends}")


def check_chat_template(prompting: Prompting) -> Iterator[Finding]:
    """Whether the prompt is in the rendered text, a turn begins and ends, and there is one template only."""
    template, options = prompting.tokenizer.chat_template, prompting.template_options
    text = template if isinstance(template, str) else json.dumps(template or "")
    problems = [
        Finding(
            "warning",
            f"chat template: does not read {name} of trainer.chat_template_kwargs",
            f"no trainer.chat_template_kwargs.{name}",
        )
        for name in options
        if name not in text
    ]
    if template:
        problems += [*_compare_files(prompting), *_render(prompting)]
    shown = "the tokenizer's, with a turn begun and ended" if template else "none; prompts go in as they are"
    yield from problems or [Finding("ok", f"chat template: {shown}")]


def _compare_files(prompting: Prompting) -> Iterator[Finding]:
    """A folder may have its template in two places, and each reader takes one of them."""
    first, second = (Path(prompting.model) / name for name in ("chat_template.jinja", "tokenizer_config.json"))
    if not (first.is_file() and second.is_file()):
        return
    other = json.loads(second.read_text(encoding="utf-8")).get("chat_template")
    if isinstance(other, list):
        other = {named.get("name"): named.get("template") for named in other}.get("default")
    # Jinja leaves out one line break at the end.
    if isinstance(other, str) and other.removesuffix("\n") != first.read_text(encoding="utf-8").removesuffix("\n"):
        yield Finding(
            "stop",
            f"chat template: {first.name} and {second.name} in {prompting.model} differ, and engines take either",
            f"the template in {first.name} alone, and no chat_template in {second.name}",
        )


def _render(prompting: Prompting) -> Iterator[Finding]:
    def render(*messages: dict[str, str], begin: bool) -> str:
        return prompting.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=begin, **prompting.template_options
        )

    user, where = {"role": "user", "content": _QUESTION}, f"chat_template of {prompting.model}"
    try:
        prompt, without_turn = render(user, begin=True), render(user, begin=False)
    except Exception as error:  # Jinja's, or what the template itself raises
        yield Finding.of_error(error, "chat template: fails on a prompt: ")
        return
    if _QUESTION not in prompt:
        yield Finding(
            "stop",
            f"chat template: leaves the prompt out ({prompt[:80]!r})",
            f"{{{{ message['content'] }}}} of every message in {where}",
        )
    elif prompt == without_turn:
        yield Finding(
            "warning",
            "chat template: has no generation prompt, so that the model goes on with the user's turn",
            f"{{% if add_generation_prompt %}}...{{% endif %}} in {where}",
        )
    try:
        turn = render(user, {"role": "assistant", "content": _ANSWER}, begin=False)
    except Exception:  # not every template takes an answer, and training needs none
        return
    if _ANSWER in turn:
        yield from _check_turn_end(prompting, turn.rpartition(_ANSWER)[2], where)


def _check_turn_end(prompting: Prompting, rest: str, where: str) -> Iterator[Finding]:
    """Whether what follows an answer is what ends a completion."""
    tokenizer, eos_ids = prompting.tokenizer, prompting.eos_ids
    after = tokenizer(rest, add_special_tokens=False)["input_ids"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if after and after[0] in special and after[0] not in eos_ids:
        yield Finding(
            "warning",
            f"chat template: ends a turn with {tokenizer.convert_ids_to_tokens(after[0])!r}, which ends no completion",
            f"eos_token_id: {[after[0], *eos_ids]} in generation_config.json of {prompting.model}",
        )
    elif eos_ids and not set(after) & set(eos_ids):
        yield Finding(
            "warning",
            f"chat template: ends an answer with {rest!r}, without {tokenizer.convert_ids_to_tokens(eos_ids[0])!r}, which "
            "ends a completion",
            f"{{{{ eos_token }}}} after the content of an assistant's message in {where}",
        )


def check_prompts(
    problems: Sequence[Problem], heldout: Sequence[Problem], prompting: Prompting, config: DRPOConfig
) -> Iterator[Finding]:
    """Whether prompts have the marks of a conversation once, known characters, and room for a completion."""
    tokenizer, first = prompting.tokenizer, problems[0]
    longest = sorted(problems, key=lambda problem: len(problem.prompt))[-_TOKENIZED:]
    rows = [prompting.ids(problem) for problem in longest]
    ids = prompting.ids(first)
    special = [token for token in tokenizer.all_special_tokens if len(token) > 2 and token in first.prompt]
    bos, unknown = tokenizer.bos_token_id, tokenizer.unk_token_id
    with_unknown = [p for p, row in zip(longest, rows, strict=True) if unknown is not None and unknown in row]
    if tokenizer.chat_template and special:
        yield Finding(
            "stop",
            f"prompt: has {special[0]!r} in its text, and the chat template is put around it",
            "task.template and data without the marks of a chat template",
        )
    elif bos is not None and ids[:2] == [bos, bos]:
        yield Finding(
            "stop", f"prompt: begins with {tokenizer.bos_token!r} twice", f"task.template without {tokenizer.bos_token}"
        )
    elif with_unknown:
        yield Finding(
            "warning",
            f"prompt: {len(with_unknown)} of {len(longest)} have characters that the tokenizer does not know, as "
            f"{with_unknown[0].prompt[:60]!r}",
            f"data and task.template without what becomes {tokenizer.unk_token}, or another model",
        )
    else:
        shown = tokenizer.decode(ids)
        yield Finding("ok", f"prompt: {shown if len(shown) <= 100 else f'{shown[:50]} ... {shown[-50:]}'!r}")
    for split, asked in (("train", problems), ("heldout", heldout)):
        completion, options = config.max_completion_length or 0, prompting.template_options
        refuse_longer_prompts(asked, tokenizer, prompting.positions, completion, f"task.{split}", options)
