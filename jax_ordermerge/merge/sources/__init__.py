"""Models on disk, as a merge reads them."""
