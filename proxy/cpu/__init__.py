"""Accept/reject sampling on a CPU: a compiled loop in the place of tensor operations.

- `rows`   - the door: the rows of a batch, laid out for the kernel.
- `kernel` - the loop, compiled by numba, with the struct that it reads of a request.

Imports nothing of `proxy.engine`. Importing `kernel` or `rows` imports numba.
"""
