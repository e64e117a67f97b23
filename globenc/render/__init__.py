"""An Attribution made visible: HTML, terminal, matplotlib. All three show the same `view`."""
