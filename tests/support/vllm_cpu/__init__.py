"""vLLM's CPU build as the engine that samples a trainer's rollouts, from an environment of its own.

vLLM needs another Transformers than the trainer, so that it runs in another process: ``server``, which speaks
JSON over pipes, in the environment that ``make .venv-vllm/installed`` makes from ``requirements.txt``.
``engine`` starts it, sends it the trainer's weights and is a trainer's ``rollout_func``.
"""
