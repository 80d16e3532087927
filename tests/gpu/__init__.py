"""Every GPU backend of every op against the float64 reference; `make gpu` runs it and keeps the results as a record."""
