"""What an experiment needs on hardware that need not be here: its real programs compiled for it, an estimate on paper, better settings."""
