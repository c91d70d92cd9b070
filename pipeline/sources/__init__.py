"""Where images come from: folders, tars, Parquet, tables of URIs, datasets."""
