"""Which calibration set is worth what: measurements with dfq's public API only."""
