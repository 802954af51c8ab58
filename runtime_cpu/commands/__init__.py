"""Commands on a model file: a conversation, what the file holds, and how well the model predicts a text."""
