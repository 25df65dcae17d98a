"""Recorded routing in the forms that rollout engines hand over: one loader a file."""

from .vllm import from_vllm

__all__ = ["from_vllm"]
