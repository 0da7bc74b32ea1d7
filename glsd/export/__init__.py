"""Writing a trained network for other libraries, with a proof that its features are ours."""
