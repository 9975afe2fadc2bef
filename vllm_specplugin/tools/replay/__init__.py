"""Tools on recorded traces: replay of policies, tuning, calibration reports."""
