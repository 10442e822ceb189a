"""Measuring a ControlNet as a run's validations do, without training (--evaluate)."""
