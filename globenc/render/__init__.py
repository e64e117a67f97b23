"""An attribution made visible: HTML, terminal, matplotlib. No file here imports a type of results."""
