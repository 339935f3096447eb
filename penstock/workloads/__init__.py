"""What is asked of a cluster, and when: traces, generators, and what can be made of them."""
