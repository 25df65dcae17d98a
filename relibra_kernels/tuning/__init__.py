"""The offline tool: which configs a GPU gets, measured where it is here, else compiled and ranked by a model."""
