"""Launch targets: each module registers one. Its template lies beside it."""
