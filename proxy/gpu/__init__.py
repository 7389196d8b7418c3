"""Accept/reject sampling on a GPU: two Triton kernels in the place of some sixty tensor operations.

- `rows`   - the door: the rows of a batch, laid out for the kernels.
- `kernel` - the kernels.

Imports nothing of `proxy.engine`. Importing `kernel` or `rows` imports Triton.
"""
