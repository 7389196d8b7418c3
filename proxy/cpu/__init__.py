"""Accept/reject sampling on a CPU: a compiled loop in the place of tensor operations.

- `rows`   - the door: the rows of a batch, laid out for the kernel.
- `kernel` - the loop, compiled by numba, with the struct that it reads of a request.

Imports nothing of `proxy.engine`. Importing `kernel` or `rows` imports numba.
"""

BLOCK_TOKENS = 32
"""Block size of vLLM's KV cache on a CPU, in servers and rollouts: the least that its attention is optimised for. Only
whole blocks are shared, and vLLM's own of 128 tokens are longer than many prompts.
"""
