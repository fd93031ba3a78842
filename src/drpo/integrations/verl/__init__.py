"""Every objective as a policy loss of verl: ``actor_rollout_ref.actor.policy_loss.loss_mode=drpo``.

Importing this package registers the losses. In a worker, verl imports it through the entry point
``verl.plugins``, ``VERL_USE_EXTERNAL_MODULES=drpo.integrations.verl`` or
``actor_rollout_ref.model.external_lib=drpo.integrations.verl``.
"""

from __future__ import annotations

import logging

from drpo.errors import require_extra

logger = logging.getLogger(__name__)

require_extra("verl", "drpo.integrations.verl")

try:
    from drpo.integrations.verl.config import PolicyLoss
    from drpo.integrations.verl.losses import register
    from drpo.integrations.verl.maxima import keep_maxima
    from drpo.integrations.verl.without_trl import let_verl_find_no_trl

    let_verl_find_no_trl()
    keep_maxima()
    LOSS_MODES = register()
    """Objectives by the ``loss_mode`` they have in verl."""
except Exception as error:
    # verl says at level DEBUG alone that a plug-in has failed.
    logger.error("drpo.integrations.verl is NOT loaded, and verl has none of its losses: %s", error)
    raise

__all__ = ["LOSS_MODES", "PolicyLoss"]
