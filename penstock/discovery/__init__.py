"""Who is there: the port (`api`) and one file per backend."""
