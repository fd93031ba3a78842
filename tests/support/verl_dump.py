"""A plug-in of verl that writes what each call of the loss drpo is given: FOLDER/RANK-CALL.pt, FOLDER in DUMP."""

from __future__ import annotations

import functools
import itertools
import os
from typing import Any

import torch
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

import drpo.integrations.verl  # noqa: F401

_calls = itertools.count()
_policy_loss = POLICY_LOSS_REGISTRY["drpo"]


@functools.wraps(_policy_loss)
def _dump(**given: Any) -> Any:
    names = ("log_prob", "old_log_prob", "advantages", "response_mask")
    path = f"{os.environ['DUMP']}/{os.environ['RANK']}-{next(_calls):04d}.pt"
    torch.save({name: given[name].detach() for name in names}, path)
    return _policy_loss(**given)


POLICY_LOSS_REGISTRY["drpo"] = _dump
