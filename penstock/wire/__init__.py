"""Messages between processes: the port (`api`) and one file per backend."""
