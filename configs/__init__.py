"""Templates that work as they stand: study.yaml, site.yaml and server.yaml."""
