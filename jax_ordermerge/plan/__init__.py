"""Plans of experiments for devices that need not be present: memory, time, better settings."""
