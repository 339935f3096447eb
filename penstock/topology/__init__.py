"""What is wired to what: the port (`api`), one file per source of such knowledge, and the servers that one can buy."""
