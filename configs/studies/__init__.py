"""Study templates, for `fl-study new`."""
