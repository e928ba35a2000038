"""Readers of tables (delimited text, JSON, spreadsheets, parquet, arrow) as rows of JSON values."""
