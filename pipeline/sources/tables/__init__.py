"""Columns of tables: which hold images, how text becomes rows, what a label is."""
