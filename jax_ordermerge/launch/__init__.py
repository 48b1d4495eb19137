"""Scripts and manifests that run an experiment on other machines."""
