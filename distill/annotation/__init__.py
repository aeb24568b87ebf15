"""The teacher's reasoning data: predict, explain, retry, quarantine; and the ledger of paid answers."""
