"""The collector: the only privileged process.  Kernel → batches → bus."""
