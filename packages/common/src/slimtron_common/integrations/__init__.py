"""The only modules that know how the versions of a library differ."""
