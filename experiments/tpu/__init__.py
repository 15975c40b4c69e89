"""Programs of a sweep, compiled for TPUs that are not there."""
