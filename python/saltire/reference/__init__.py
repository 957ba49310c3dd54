"""Pure-torch specification of every op: the shortest correct code, float64, for tests and benches."""
