"""The way of a token: to the ranks that compute it, and back."""
