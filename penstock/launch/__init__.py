"""Starting and stopping workers: the port (`api`) and one file per backend."""
