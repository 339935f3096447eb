"""Load for servers that speak OpenAI's API: requests of a workload over HTTP, and what clients saw of the answers."""
