"""What the trust region did, for any objective, from the tokens and their gradient weights alone."""

from drpo.metrics.trust_region import TrustRegion, TrustRegionMetrics

__all__ = ["TrustRegion", "TrustRegionMetrics"]
