"""Every guarantee Isocenter gives: what may leave a site, who may speak, what is written down. Imports nothing of ours."""
