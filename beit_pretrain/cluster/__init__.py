"""Many processes and machines: what started this one, signals, going back into the queue, jobs, sharding."""
