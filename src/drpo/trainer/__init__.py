"""The objectives in TRL: everything that sees the trainer's inputs."""
