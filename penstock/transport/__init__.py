"""Moving KV: the port (`api`) and one file per backend."""
