"""Using a trained network: embed, search, export."""
