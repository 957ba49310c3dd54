"""Pure-torch specification of every op: shortest correct code, for tests and benches."""
