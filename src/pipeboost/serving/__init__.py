"""`pipeboost serve`: an HTTP process that holds no model, and a worker that holds one.

The HTTP process (`server`, `api/`) keeps jobs in a database (`store`) and hands one at a time, the next by `order`, to
the worker (`worker`), which a `supervisor` starts, watches and starts again. They speak JSON over a Unix socket
(`wire`). Nothing but `worker` imports torch.
"""
