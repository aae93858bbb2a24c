"""MLflow runs, tables and figures: the view of the results that people look at."""
