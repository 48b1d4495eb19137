"""Generation, and tasks scored by it."""
