"""How good a model is: held-out accuracy while it trains, and sampled evaluations with intervals."""
