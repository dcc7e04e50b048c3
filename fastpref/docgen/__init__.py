"""Pages and help texts that are written from declarations in the code."""
