"""The paper in miniature: arms, settings and seeds as one grid of runs, each a :class:`drpo.DRPOTrainer`'s."""
