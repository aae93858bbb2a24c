"""The stages, the matrix that chains them and the folder of results they share."""
