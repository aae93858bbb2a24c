"""JUMP Cell Painting: bucket layout, metadata tables, MoA rule, image preparation, ingest, simulator."""
