"""A notebook-first research workbench for latent reasoning."""
