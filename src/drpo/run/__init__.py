"""A run on disk: its recipe, its folder, and the way from one to the other."""
