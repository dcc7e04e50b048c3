"""Training loops of other libraries, with the snippets of docs/integrations.md inside them."""
