"""KV memory: who holds which block. Pure bookkeeping; bytes are moved by `transport`."""
