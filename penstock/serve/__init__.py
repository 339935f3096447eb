"""The request's path, in reading order: frontend, openai, text, router, worker, decode, handoff, prefill, rpc."""
