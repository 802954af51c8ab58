"""The teacher: its server, weights and watchdog, the client that asks it, and the ledger of its answers."""
