"""Results as one self-contained page for a browser: nothing on it is loaded from elsewhere."""
