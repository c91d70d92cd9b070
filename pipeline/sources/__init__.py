"""Sources of images: folders, tars, Parquet, tables of URIs, datasets."""
