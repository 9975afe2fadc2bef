"""Draft heads on the target's last hidden state: files, training, calibration."""
