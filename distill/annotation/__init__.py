"""The teacher's reasoning data: predict, explain on failure, retry, quarantine; and the ledger of paid answers."""
