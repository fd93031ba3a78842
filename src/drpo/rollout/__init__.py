"""What the behaviour policy μ was: its log-probs as sampled, and whether π agrees with them."""
