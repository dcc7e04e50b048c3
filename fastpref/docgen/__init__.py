"""Pages and help texts, generated from declarations in the code."""
