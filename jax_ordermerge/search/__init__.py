"""Which merge to ship: candidates made in device memory, measured on validation examples, and chosen by paired differences."""
