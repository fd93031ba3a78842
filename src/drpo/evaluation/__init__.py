"""How good a model is: sampled evaluations with intervals, after training."""
