"""From files to padded batches, and the orders in which they are seen."""
