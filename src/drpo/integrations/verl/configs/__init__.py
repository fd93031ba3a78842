"""Hydra configurations that any run of verl can take: ``hydra.searchpath=[pkg://drpo.integrations.verl.configs] +drpo=loss``."""
