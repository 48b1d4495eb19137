"""What runs an experiment elsewhere: scripts and manifests, written from a config to be read and kept."""
