"""What the order did to the losses, and its pictures."""
