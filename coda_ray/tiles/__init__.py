"""The tile store: schema, writer, index, reader, the seeded sample plan and the Ray Data stream."""
