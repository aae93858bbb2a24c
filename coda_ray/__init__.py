"""coda_ray: label-free domain adaptation of Cell Painting models, distributed with Ray."""
