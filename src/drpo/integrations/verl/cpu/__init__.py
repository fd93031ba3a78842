"""verl's trainer on a CPU, whole, as plug-ins and without an edit to verl: a laptop is enough to develop one's own.

``plugin`` is what verl imports, by VERL_USE_EXTERNAL_MODULES: it registers ``platform``, the CPU as a
device with gloo, and ``rollout``, a backend in which Transformers samples, with the log-probs of what
it sampled from, in a Ray actor. ``settings`` has the environment and the overrides for

    python -m verl.trainer.main_ppo
"""
