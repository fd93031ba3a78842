"""The settings of the paper as configurations of verl's trainer. Hydra reads them from ``pkg://drpo.recipes.verl``."""
