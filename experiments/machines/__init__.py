"""What sweeps of large models need of large machines."""
