"""The objectives in TRL: everything that sees the trainer's inputs."""

from drpo.errors import require_extra

require_extra("trl", "drpo.trainer")
