"""What a pre-trained encoder can do: position accuracy on held-out volumes."""
