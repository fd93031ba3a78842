"""The objectives in other people's trainers: each integration translates, and refuses what it would ignore."""
