"""What the book's chapters share, and what writes its front page and the README's."""
